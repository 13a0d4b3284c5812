"""Graphics cards by their data sheets: memory, its bandwidth, and what their matrix units multiply.

A card's row holds what its vendor publishes: memory in GiB, bandwidth in GB/s, FP32 TFLOPS at boost clock. What its
matrix units do follows from the architecture: dense FP16 (sums in FP32) and dense INT8 rates as multiples of FP32.

Sources: NVIDIA's product pages and its architecture white papers (Pascal P100, Volta V100, Turing, GA100, GA102, Ada,
Hopper, RTX Blackwell: peak rates per SM); AMD's product pages and its RDNA, CDNA and GCN instruction set guides (dot
products and WMMA per clock); Intel's Arc product pages (XMX). GeForce cards halve FP16 with sums in FP32, which their
white papers state, workstation cards of the same chips do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture", "CardSheet", "all_cards"]


@dataclass(frozen=True)
class Architecture:
    """`fp16` and `int8` are dense rates as multiples of the FP32 rate. `replays_graphs`: llama.cpp submits a token's
    kernels as one CUDA graph (ggml-cuda.cu: from compute capability 8.0 on), else one by one."""

    fp16: float
    int8: float
    pcie: int
    replays_graphs: bool = False
    kind: str = "NVIDIA"


ARCHITECTURES = {
    "pascal": Architecture(1, 4, 3),  # DP4A; its FP16 is slower than FP32, which is used then
    "pascal-p100": Architecture(2, 1, 3),
    "volta": Architecture(8, 4, 3),
    "turing": Architecture(4, 16, 3),
    "turing-pro": Architecture(8, 16, 3),
    "turing-16": Architecture(2, 4, 3),  # GTX 16: no matrix units
    "ga100": Architecture(16, 32, 4, True),
    "ampere": Architecture(2, 8, 4, True),
    "ampere-pro": Architecture(4, 8, 4, True),
    "ada": Architecture(2, 8, 4, True),
    "ada-pro": Architecture(4, 8, 4, True),
    "hopper": Architecture(14.8, 29.5, 5, True),
    "blackwell": Architecture(2, 8, 5, True),
    "blackwell-pro": Architecture(4, 8, 5, True),
    "b200": Architecture(30, 60, 5, True),
    "gcn": Architecture(2, 2, 3, kind="AMD"),
    "gcn-dot": Architecture(2, 4, 4, kind="AMD"),  # Vega 20
    "rdna1": Architecture(2, 2, 4, kind="AMD"),
    "rdna2": Architecture(2, 4, 4, kind="AMD"),
    "rdna3": Architecture(2, 2, 4, kind="AMD"),
    "rdna4": Architecture(4, 8, 5, kind="AMD"),
    "cdna1": Architecture(8, 8, 4, kind="AMD"),
    "cdna2": Architecture(8, 8, 4, kind="AMD"),
    "cdna3": Architecture(8, 16, 5, kind="AMD"),
    "alchemist": Architecture(7, 14, 4, kind="Intel"),
    "battlemage": Architecture(8.5, 17, 4, kind="Intel"),
}

# name: GiB, GB/s, FP32 TFLOPS[, lanes where fewer than 16]
_TABLE = """
pascal
  gtx1060 6 192 4.4 | gtx1070 8 256 6.5 | gtx1070ti 8 256 8.2 | gtx1080 8 320 8.9 | gtx1080ti 11 484 11.3
  titanxp 12 548 12.1 | p4 8 192 5.5 | p40 24 346 11.8 | quadrop5000 16 288 8.9 | quadrop6000 24 432 12.6
pascal-p100
  p100 16 732 9.3
volta
  v100 16 900 14.1 | v100-32gb 32 900 14.1 | titanv 12 653 13.8
turing
  rtx2060 6 336 6.5 | rtx2060-12gb 12 336 7.2 | rtx2060super 8 448 7.2 | rtx2070 8 448 7.5 | rtx2070super 8 448 9.1
  rtx2080 8 448 10.1 | rtx2080super 8 496 11.2 | rtx2080ti 11 616 13.4
turing-pro
  titanrtx 24 672 16.3 | t4 16 320 8.1 | quadrortx4000 8 416 7.1 | quadrortx5000 16 448 11.2
  quadrortx6000 24 672 16.3 | quadrortx8000 48 672 16.3
turing-16
  gtx1650 4 128 3.0 | gtx1650super 4 192 4.4 | gtx1660 6 192 5.0 | gtx1660super 6 336 5.0 | gtx1660ti 6 288 5.4
ga100
  a30 24 933 10.3 | a100 40 1555 19.5 | a100-80gb 80 2039 19.5
ampere
  rtx3050 8 224 9.1 8 | rtx3050-6gb 6 168 6.8 8 | rtx3060 12 360 12.7 | rtx3060-8gb 8 240 12.7 | rtx3060ti 8 448 16.2
  rtx3070 8 448 20.3 | rtx3070ti 8 608 21.7 | rtx3080 10 760 29.8 | rtx3080-12gb 12 912 30.6
  rtx3080ti 12 912 34.1 | rtx3090 24 936 35.6 | rtx3090ti 24 1008 40.0
  rtx3050laptop 4 192 7.1 8 | rtx3060laptop 6 336 10.9 | rtx3070laptop 8 448 15.9 | rtx3070tilaptop 8 448 16.6
  rtx3080laptop 16 448 19.0 | rtx3080tilaptop 16 512 23.6
ampere-pro
  rtxa1000 8 192 6.7 8 | rtxa2000 6 288 8.0 | rtxa2000-12gb 12 288 8.0 | rtxa4000 16 448 19.2 | rtxa4500 20 640 23.7
  rtxa5000 24 768 27.8 | rtxa5500 24 768 34.1 | rtxa6000 48 768 38.7 | a10 24 600 31.2 | a10g 24 600 31.5
  a40 48 696 37.4
ada
  rtx4060 8 272 15.1 8 | rtx4060ti 8 288 22.1 8 | rtx4060ti-16gb 16 288 22.1 8 | rtx4070 12 504 29.1
  rtx4070super 12 504 35.5 | rtx4070ti 12 504 40.1 | rtx4070tisuper 16 672 44.1 | rtx4080 16 716.8 48.7
  rtx4080super 16 736 52.2 | rtx4090 24 1008 82.6 | rtx4090d 24 1008 73.5 | rtx4090-48gb 48 1008 82.6
  rtx4050laptop 6 192 9.0 8 | rtx4060laptop 8 256 11.6 8 | rtx4070laptop 8 256 15.6 8 | rtx4080laptop 12 432 24.7
  rtx4090laptop 16 576 33.0
ada-pro
  rtx2000ada 16 224 12.0 8 | rtx4000ada 20 360 26.7 | rtx4000sffada 20 280 19.2 | rtx4500ada 24 432 39.6
  rtx5000ada 32 576 65.3 | rtx6000ada 48 960 91.1 | l4 24 300 30.3 | l40 48 864 90.5 | l40s 48 864 91.6
hopper
  h100 80 3350 67 | h100pcie 80 2039 51 | h200 141 4800 67 | gh200 96 4000 67
blackwell
  rtx5050 8 320 13.2 8 | rtx5060 8 448 19.2 8 | rtx5060ti 8 448 23.7 8 | rtx5060ti-16gb 16 448 23.7 8
  rtx5070 12 672 30.9 | rtx5070ti 16 896 43.9 | rtx5080 16 960 56.3 | rtx5090 32 1792 104.8 | rtx5090d 32 1792 104.8
  rtx5050laptop 8 384 11.0 8 | rtx5060laptop 8 384 14.0 8 | rtx5070laptop 8 384 17.0 8 | rtx5070tilaptop 12 672 23.0
  rtx5080laptop 16 896 30.0 | rtx5090laptop 24 896 36.0
blackwell-pro
  rtxpro2000 16 288 17.0 8 | rtxpro4000 24 672 46.9 | rtxpro4500 32 896 54.9 | rtxpro5000 48 1344 73.7
  rtxpro6000 96 1792 125 | rtxpro6000maxq 96 1792 110 | gb10 128 273 31
b200
  b200 180 8000 75
gcn
  rxvega56 8 410 10.5 | rxvega64 8 484 12.7 | mi25 16 484 12.3
gcn-dot
  radeonvii 16 1024 13.4 | mi50 16 1024 13.3 | mi50-32gb 32 1024 13.3 | mi60 32 1024 14.7
rdna1
  rx5600xt 6 288 7.2 | rx5700 8 448 7.9 | rx5700xt 8 448 9.8
rdna2
  rx6600 8 224 8.9 8 | rx6600xt 8 256 10.6 8 | rx6650xt 8 280 10.8 8 | rx6700 10 320 11.3 | rx6700xt 12 384 13.2
  rx6750xt 12 432 13.3 | rx6800 16 512 16.2 | rx6800xt 16 512 20.7 | rx6900xt 16 512 23.0 | rx6950xt 16 576 23.7
  w6800 32 512 17.8 | v620 32 512 20.3
rdna3
  rx7600 8 288 21.8 8 | rx7600xt 16 288 22.6 8 | rx7700xt 12 432 35.2 | rx7800xt 16 624 37.3 | rx7900gre 16 576 46.0
  rx7900xt 20 800 51.5 | rx7900xtx 24 960 61.4 | w7700 16 576 28.3 | w7800 32 576 45.2 | w7900 48 864 61.3
  radeon8060s 96 256 29.7
rdna4
  rx9060xt 8 320 25.6 | rx9060xt-16gb 16 320 25.6 | rx9070gre 12 432 34.3 | rx9070 16 640 36.1 | rx9070xt 16 640 48.7
  r9700 32 640 47.8
cdna1
  mi100 32 1228 23.1
cdna2
  mi210 64 1638 22.6 | mi250 128 3277 45.3
cdna3
  mi300x 192 5300 81.7
alchemist
  arca380 6 186 4.2 8 | arca580 8 512 12.3 | arca750 8 512 17.2 | arca770 16 560 19.7
battlemage
  arcb570 10 380 11.5 8 | arcb580 12 456 13.7 8 | arcprob50 16 224 10.6 8 | arcprob60 24 456 12.3 8
"""


@dataclass(frozen=True)
class CardSheet:
    """One row. `name` is lower case without spaces; bytes, bytes per second, FP32 operations per second."""

    name: str
    architecture: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    fp32_flops: float
    lanes: int = 16


def all_cards() -> Iterator[CardSheet]:
    """The table's cards, by architecture."""
    architecture = ""
    for line in _TABLE.strip().splitlines():
        if not line.startswith(" "):
            architecture = line.strip()
            continue
        for row in line.split("|"):
            name, gib, gbs, tflops, *lanes = row.split()
            yield CardSheet(
                name,
                architecture,
                int(gib) << 30,
                float(gbs) * 1e9,
                float(tflops) * 1e12,
                int(lanes[0]) if lanes else 16,
            )
