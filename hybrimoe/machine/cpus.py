"""Processors by family: instruction set, memory, clock, and how fast one core multiplies.

A family's `rate` is a core's speed at ggml's quantised dot products per clock: 1 for Zen 3 with AVX2, which was
measured (`rates.dot_ns`). The others follow from their vectors: half-wide units (Zen 1, AVX without AVX2), AVX-VNNI and
AVX-512 VNNI (one instruction for three), two AVX-512 units (Zen 5). Measured on one's own machine, a probe replaces all
of it. `ghz` is a usual clock with all cores busy.

Sources: AMD's and Intel's product pages (cores, memory channels, PCIe generation), uops.info (vector units per core).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["FAMILIES", "CpuSheet", "Family", "all_cpus", "family_of"]


@dataclass(frozen=True)
class Family:
    """`ram` is the memory that such machines usually have, as `ram=` takes it. `ccd_gbs`: what one chiplet reads from
    memory (its fabric link, 32 bytes a clock); `pattern` recognises names that the table does not list."""

    title: str
    isa: str
    rate: float
    ghz: float
    pcie: int
    ram: str
    pattern: str
    ccd_cores: int = 0
    ccd_gbs: float = 0.0


FAMILIES = {
    "zen1": Family("Zen, Zen+", "avx2", 0.5, 3.8, 3, "ddr4-2933x2", r"r?(ryzen[3579])?[12]\d00[xgaf]{0,2}"),
    "zen2": Family("Zen 2", "avx2", 0.9, 4.1, 4, "ddr4-3200x2", r"(ryzen[3579])?3\d[05]0(x|xt|g)?"),
    "zen3": Family("Zen 3", "avx2", 1.0, 4.5, 4, "ddr4-3200x2", r"(ryzen[3579])?5\d[05]0(x|x3d|xt|g|gt|h|hx|u)?"),
    "zen4": Family("Zen 4", "avx512-vnni", 1.3, 5.0, 5, "ddr5-5600x2",
            r"(ryzen[3579])?[78]\d\d0(x|x3d|f|g|h|hs|hx|u)?",
                   ccd_cores=8, ccd_gbs=64),
    "zen5": Family("Zen 5", "avx512-vnni", 1.5, 5.1, 5, "ddr5-5600x2", r"(ryzen[3579])?9\d\d0(x|x3d|hx)?|ryzenai.*",
                   ccd_cores=8, ccd_gbs=64),
    "skylake": Family("Core 6 to 10", "avx2", 0.9, 4.4, 3, "ddr4-2666x2",
            r"(i[3579])?([6789]|10)\d{3}(k|kf|t|f|ks|h|hk)?"),
    "haswell": Family("Core 4 and 5", "avx2", 0.8, 3.9, 3, "ddr3-1600x2", r"(i[357])?[45]\d{3}(k|t|s|c|r)?"),
    "rocketlake": Family("Core 11", "avx512-vnni", 1.15, 4.6, 4, "ddr4-3200x2", r"(i[3579])?11\d{3}(k|kf|f|t|h)?"),
    "alderlake": Family("Core 12 to 14", "avx-vnni", 1.15, 4.8, 5, "ddr5-5600x2",
            r"(i[3579])?1[234]\d{3}(k|kf|f|ks|t|h|hx)?"),
    "arrowlake": Family("Core Ultra 2", "avx-vnni", 1.2, 5.3, 5, "ddr5-5600x2",
            r"(ultra)?[3579]?2\d5(k|kf|f|h|hx)?"),
    "skylake-x": Family("Core X", "avx512", 1.15, 4.3, 3, "ddr4-2933x4", r"(i[79])?(78|79|98|99|109)\d\d(x|xe)"),
    "zen2-tr": Family("Threadripper 3000", "avx2", 0.9, 3.9, 4, "ddr4-3200x4",
            r"(threadripper|tr)(pro)?39\d\d(x|wx)"),
    "zen3-tr": Family("Threadripper PRO 5000", "avx2", 1.0, 4.2, 4, "ddr4-3200x8",
            r"(threadripper|tr)(pro)?59\d\dwx"),
    "zen4-tr": Family("Threadripper 7000", "avx512-vnni", 1.3, 4.5, 5, "ddr5-5200x4",
            r"(threadripper|tr)(pro)?79\d\d(x|wx)",
                      ccd_cores=8, ccd_gbs=64),
    "zen5-tr": Family("Threadripper 9000", "avx512-vnni", 1.5, 4.6, 5, "ddr5-6400x4",
            r"(threadripper|tr)(pro)?99\d\d(x|wx)",
                      ccd_cores=8, ccd_gbs=64),
    "zen1-epyc": Family("EPYC 7001", "avx2", 0.5, 2.7, 3, "ddr4-2666x8", r"epyc7\d\d1p?"),
    "zen2-epyc": Family("EPYC 7002", "avx2", 0.9, 3.0, 4, "ddr4-3200x8", r"epyc7.\d2p?"),
    "zen3-epyc": Family("EPYC 7003", "avx2", 1.0, 3.0, 4, "ddr4-3200x8", r"epyc7.\d3[pxf]?"),
    "zen4-epyc": Family("EPYC 8004 and 9004", "avx512-vnni", 1.3, 3.5, 5, "ddr5-4800x12", r"epyc[89]\d.4[pxf]?"),
    "zen5-epyc": Family("EPYC 9005", "avx512-vnni", 1.5, 3.8, 5, "ddr5-6000x12", r"epyc9\d.5[pxf]?(epyc9\d.5)?"),
    "ivybridge-xeon": Family("Xeon E5 v1 and v2", "avx", 0.45, 3.0, 3, "ddr3-1600x4",
            r"(xeon)?e5-?[124]6\d\d(l|w)?(v2)?"),
    "haswell-xeon": Family("Xeon E5 v3 and v4", "avx2", 0.8, 2.9, 3, "ddr4-2133x4",
            r"(xeon)?e5-?[124]6\d\d(l|w|a)?v[34]"),
    "skylake-xeon": Family("Xeon Scalable 1 and 2", "avx512", 1.15, 2.9, 3, "ddr4-2666x6",
                           r"(xeon)?(gold|silver|platinum|bronze|w)-?[3-9][12]\d\d[rmlynust]?|(xeon)?w-?(21|22|31|32)\d\d.?"),
    "icelake-xeon": Family("Xeon Scalable 3", "avx512-vnni", 1.2, 3.0, 4, "ddr4-3200x8",
                           r"(xeon)?(gold|silver|platinum|w)-?[3-9]3\d\d[a-z]?"),
    "sapphire-xeon": Family("Xeon Scalable 4 and 5", "avx512-vnni", 1.4, 3.0, 5, "ddr5-4800x8",
                            r"(xeon)?(gold|silver|platinum|max)-?[3-9][45]\d\d[a-z]?\+?"),
    "sapphire-w": Family("Xeon W-2400 and W-3400", "avx512-vnni", 1.4, 3.4, 5, "ddr5-4800x8",
            r"(xeon)?w[3579]-?[23][45]\d\d(x|wx)?"),
    "granite-xeon": Family("Xeon 6", "avx512-vnni", 1.4, 3.0, 5, "ddr5-6400x12", r"(xeon)?6[79]\d\d[pe]"),
    "strix-halo": Family("Ryzen AI Max", "avx512-vnni", 1.5, 4.8, 4, "lpddr5x-8000x4", r"(ryzen)?(ai)?max\+?3\d\d"),
    "altra": Family("Ampere Altra", "neon", 0.6, 3.0, 4, "ddr4-3200x8", r"(altra|q\d\d-\d\d|m128-\d\d)"),
    "unknown": Family("unknown", "avx2", 1.1, 4.5, 4, "ddr5-5600x2", r"unknown|notstated.*|\d+-?core(s)?"),
}  # fmt: skip

# by family: name, performance-cores[+efficiency-cores][@GHz with all cores busy]
_TABLE = """
zen1
  1600x 6 | 1700 8@3.2 | 1800x 8 | 2600 6 | 2600x 6@4.0 | 2700 8@3.4 | 2700x 8@4.0
zen2
  3600 6@4.0 | 3600x 6 | 3700x 8 | 3800x 8@4.2 | 3900x 12 | 3950x 16@3.9 | 3400g 4@3.9 | 4750g 8
zen3
  5500 6@4.2 | 5600 6@4.3 | 5600g 6@4.3 | 5600x 6 | 5600x3d 6@4.3 | 5700g 8@4.4 | 5700x 8@4.3 | 5700x3d 8@4.0
  5800x 8@4.6 | 5800x3d 8@4.3 | 5900x 12 | 5950x 16@4.4 | 5900hx 8@4.0 | 5800h 8@3.9
zen4
  7500f 6@4.9 | 7600 6@4.9 | 7600x 6@5.2 | 7700 8 | 7700x 8@5.2 | 7800x3d 8@4.8 | 7900 12 | 7900x 12@5.1
  7900x3d 12 | 7950x 16@5.1 | 7950x3d 16 | 7945hx 16@4.7 | 7940hs 8@4.7 | 7840hs 8@4.6 | 8700g 8@4.8
  8945hs 8@4.7
zen5
  9600x 6@5.3 | 9700x 8@5.2 | 9800x3d 8@5.2 | 9900x 12@5.2 | 9900x3d 12@5.2 | 9950x 16 | 9950x3d 16
  ryzenai9hx370 12@4.0
skylake
  i5-6500 4@3.3 | i7-6700 4@3.7 | i7-6700k 4@4.0 | i5-7600k 4@4.0 | i7-7700 4@4.0 | i7-7700k 4
  i5-8400 6@3.8 | i7-8700 6@4.3 | i7-8700k 6 | i5-9400f 6@3.9 | i5-9600k 6@4.3 | i7-9700k 8@4.6
  i9-9900k 8@4.7 | i9-9900kf 8@4.7 | i9-9900ks 8@5.0 | i9-9900t 8@3.4 | i5-10400 6@4.0 | i5-10600k 6@4.5
  i7-10700 8@4.6 | i7-10700k 8@4.7 | i9-10850k 10@4.8 | i9-10900 10@4.6 | i9-10900k 10@4.9
haswell
  i7-4770 4 | i7-4770k 4 | i7-4790k 4@4.2
rocketlake
  i5-11400 6@4.2 | i5-11600k 6 | i7-11700k 8 | i9-11900k 8@4.8
alderlake
  i3-12100 4@4.1 | i5-12400 6@4.0 | i5-12400f 6@4.0 | i5-12600k 6+4@4.5 | i7-12700 8+4@4.5
  i7-12700k 8+4@4.7 | i7-12700kf 8+4@4.7 | i9-12900k 8+8@4.9 | i9-12900ks 8+8@5.0 | i5-13400 6+4@4.1
  i5-13500 6+8@4.5 | i5-13600k 6+8@5.1 | i5-13600kf 6+8@5.1 | i7-13700 8+8@5.0 | i7-13700k 8+8@5.3
  i7-13700kf 8+8@5.3 | i7-13620h 6+4@4.5 | i7-13700h 6+8@4.4 | i9-13900h 6+8@4.6 | i9-13900hx 8+16@4.8
  i9-13900 8+16@5.2 | i9-13900k 8+16@5.5 | i9-13900kf 8+16@5.5 | i9-13900ks 8+16@5.6 | i5-14400 6+4@4.1
  i5-14500 6+8@4.5 | i5-14600k 6+8@5.3 | i5-14600kf 6+8@5.3 | i7-14700 8+12@5.0 | i7-14700k 8+12@5.5
  i7-14700kf 8+12@5.5 | i9-14900 8+16@5.2 | i9-14900k 8+16@5.6 | i9-14900kf 8+16@5.6 | i9-14900ks 8+16@5.7
  i9-14900hx 8+16@4.9
arrowlake
  ultra5245k 6+8@5.0 | ultra7265k 8+12@5.2 | ultra7265kf 8+12@5.2 | ultra9285k 8+16 | ultra9275hx 8+16@4.8
  ultra7255hx 8+12@4.7
skylake-x
  i7-7820x 8@4.0 | i9-7900x-intel 10@4.0 | i9-7980xe 18@3.4 | i9-9980xe 18@3.8 | i9-10900x 10 | i9-10920x 12
  i9-10940x 14@4.1 | i9-10980xe 18@3.8
zen2-tr
  threadripper3960x 24 | threadripper3970x 32@3.8 | threadripper3990x 64@3.2 | threadripperpro3945wx 12@4.0
  threadripperpro3955wx 16@4.0 | threadripperpro3975wx 32@3.7 | threadripperpro3995wx 64@3.2
zen3-tr
  threadripperpro5945wx 12@4.3 | threadripperpro5955wx 16@4.3 | threadripperpro5965wx 24
  threadripperpro5975wx 32@4.0 | threadripperpro5995wx 64@3.5
zen4-tr
  threadripper7960x 24@4.7 | threadripper7970x 32 | threadripper7980x 64@4.0 | threadripperpro7945wx 12@4.9
  threadripperpro7955wx 16@4.8 | threadripperpro7965wx 24@4.6 | threadripperpro7975wx 32
  threadripperpro7985wx 64@4.0 | threadripperpro7995wx 96@3.6
zen5-tr
  threadripper9960x 24@4.8 | threadripper9970x 32 | threadripper9980x 64@4.1 | threadripperpro9955wx 16@4.9
  threadripperpro9975wx 32 | threadripperpro9985wx 64@4.1 | threadripperpro9995wx 96@3.7
zen1-epyc
  epyc7251 8@2.9 | epyc7351 16@2.9 | epyc7551 32@2.5 | epyc7601 32
zen2-epyc
  epyc7252 8@3.2 | epyc7262 8@3.3 | epyc7302 16@3.1 | epyc7302p 16@3.1 | epyc7402 24 | epyc7402p 24
  epyc7452 32@2.9 | epyc7502 32 | epyc7502p 32 | epyc7542 32@3.1 | epyc7642 48@2.8 | epyc7702 64@2.5
  epyc7702p 64@2.5 | epyc7742 64@2.8 | epyc7532 32@3.0 | epyc7f52 16@3.7 | epyc7h12 64@2.9 | epyc7k62 48@2.8
  epyc7v12 64@2.8
zen3-epyc
  epyc7313 16@3.4 | epyc7343 16@3.5 | epyc7413 24@3.2 | epyc7443 24@3.4 | epyc7453 28@3.1 | epyc7513 32
  epyc7532x 32 | epyc7543 32@3.2 | epyc7543p 32@3.2 | epyc7573x 32@3.3 | epyc7643 48@2.8 | epyc7663 56@2.6
  epyc7713 64 | epyc7713p 64 | epyc7763 64@3.0 | epyc7773x 64@2.8 | epyc7b13 60@2.9 | epyc7t83 64@2.9
  epyc73f3 16@3.8 | epyc7c13 64@2.8
zen4-epyc
  epyc9124 16@3.6 | epyc9174f 16@4.2 | epyc9224 24@3.6 | epyc9254 24@3.9 | epyc9274f 24@4.1 | epyc9334 32@3.8
  epyc9354 32@3.7 | epyc9374f 32@4.1 | epyc9454 48@3.6 | epyc9474f 48@3.9 | epyc9534 64 | epyc9554 64@3.6
  epyc9634 84@3.3 | epyc9654 96@3.4 | epyc9684x 96@3.3 | epyc9754 128@3.0 | epyc8324p 32@2.9
  epyc8534p 64@3.0
zen5-epyc
  epyc9015 8@4.0 | epyc9115 16@4.0 | epyc9135 16@4.2 | epyc9175f 16@4.8 | epyc9255 24@4.2 | epyc9275f 24@4.6
  epyc9335 32@4.2 | epyc9355 32@4.2 | epyc9355p 32@4.2 | epyc9375f 32@4.6 | epyc9455 48@4.0
  epyc9475f 48@4.4 | epyc9535 64 | epyc9555 64@3.9 | epyc9575f 64@4.5 | epyc9655 96@3.6 | epyc9745 128@3.2
  epyc9755 128@3.4 | epyc9965 192@3.0
ivybridge-xeon
  e5-2650v2 8@3.0 | e5-2670 8@3.0 | e5-2680v2 10@3.1 | e5-2690v2 10@3.3 | e5-2697v2 12@3.0
haswell-xeon
  e5-1650v3 6@3.6 | e5-2620v4 8@2.3 | e5-2630v4 10@2.4 | e5-2640v4 10@2.6 | e5-2650v4 12@2.5
  e5-2670v3 12@2.6 | e5-2678v3 12@2.9 | e5-2680v3 12@2.9 | e5-2680v4 14 | e5-2690v3 12@3.1 | e5-2690v4 14@3.2
  e5-2695v4 18@2.6 | e5-2696v3 18@2.8 | e5-2696v4 22@2.8 | e5-2697v4 18@2.8 | e5-2698v4 20@2.7
  e5-2699v3 18@2.8 | e5-2699v4 22@2.8
skylake-xeon
  silver4110 8@2.4 | silver4114 10@2.5 | silver4210 10@2.7 | silver4214 12@2.7 | silver4216 16@2.7
  gold5218 16@2.8 | gold5220 18@2.7 | gold5220r 24 | gold6126 12@3.3 | gold6130 16@2.8 | gold6132 14@3.3
  gold6134 8@3.7 | gold6138 20@2.7 | gold6140 18@3.0 | gold6148 20@3.1 | gold6154 18@3.7 | gold6226r 16@3.5
  gold6230 20@2.8 | gold6238 22@2.8 | gold6240 18@3.3 | gold6242 16@3.5 | gold6248 20@3.2 | gold6248r 24@3.6
  gold6252 24@2.8 | gold6254 18@3.9 | gold6258r 28@3.4 | platinum8160 24@2.8 | platinum8168 24@3.4
  platinum8171m 26@2.8 | platinum8180 28@3.2 | platinum8259cl 24@3.1 | platinum8260 24@3.1
  platinum8268 24@3.5 | platinum8280 28@3.3 | w-2135 6@4.3 | w-2145 8@4.3 | w-2245 8@4.5 | w-2295 18@3.8
  w-3175x 28@3.8 | w-3245 16@3.9 | w-3275 28@3.2
icelake-xeon
  silver4309y 8@3.2 | silver4310 12@2.8 | silver4314 16@2.9 | silver4316 20@2.9 | gold5317 12@3.4
  gold6326 16@3.3 | gold6330 28@2.6 | gold6334 8@3.7 | gold6338 32@2.7 | gold6342 24@3.3 | gold6346 16@3.6
  gold6348 28@3.2 | gold6354 18@3.6 | platinum8358 32@3.3 | platinum8352v 36@2.5 | platinum8360y 36@3.1
  platinum8368 38@3.2 | platinum8375c 32@3.5 | platinum8380 40@3.0 | w-3345 24@3.5 | w-3365 32@3.5
  w-3375 38@3.3
sapphire-xeon
  silver4410y 12@2.8 | gold5412u 24@2.9 | gold6426y 16@3.5 | gold6430 32@2.6 | gold6438y+ 32@2.8
  gold6442y 24@3.3 | gold6448y 32@3.0 | gold6454s 32@2.8 | gold6530 32@2.7 | gold6542y 24@3.6
  platinum8452y 36@2.8 | platinum8458p 44@3.2 | platinum8460y+ 40@2.8 | platinum8462y+ 32@3.6
  platinum8468 48@3.1 | platinum8470 52@3.0 | platinum8480+ 56 | platinum8481c 56 | platinum8488c 48@3.2
  platinum8490h 60@2.9 | platinum8558 48 | platinum8568y+ 48@3.2 | platinum8575c 48@3.2 | platinum8580 60@2.9
  platinum8592+ 64@2.9
sapphire-w
  w5-2465x 16@4.0 | w7-2475x 20@3.9 | w7-2495x 24@3.9 | w5-3435x 16@4.0 | w7-3445 20@3.9 | w7-3465x 28@3.6
  w9-3475x 36@3.5 | w9-3495x 56@3.0 | w5-2565x 18@4.0 | w9-3595x 60@3.1
granite-xeon
  6740e 96@2.8 | 6747p 48@3.6 | 6767p 64@3.6 | 6787p 86@3.4 | 6960p 72@3.5 | 6972p 96@3.2 | 6980p 128@2.9
strix-halo
  ryzenaimax395 16 | ryzenaimax+395 16 | ryzenaimax390 12 | ryzenaimax385 8
altra
  q64-22 64@2.2 | q80-30 80 | m128-30 128
"""


@dataclass(frozen=True)
class CpuSheet:
    """One row: cores of one socket and their clock with all of them busy."""

    name: str
    family: str
    n_cores: int
    n_efficiency_cores: int
    ghz: float


def all_cpus() -> Iterator[CpuSheet]:
    """The table's processors, by family."""
    family = ""
    for line in _TABLE.strip().splitlines():
        if not line.startswith(" "):
            family = line.strip()
            continue
        for row in line.split("|"):
            name, cores = row.split()
            cores, _, ghz = cores.partition("@")
            big, _, small = cores.partition("+")
            yield CpuSheet(name, family, int(big), int(small or 0), float(ghz or FAMILIES[family].ghz))


def family_of(name: str) -> str | None:
    """The family that a name belongs to by its pattern, such as 'zen4' for '7800x'; None where none does."""
    return next((key for key, family in FAMILIES.items() if re.fullmatch(family.pattern, name)), None)
