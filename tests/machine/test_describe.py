"""Machines in words: the grammar, the tables behind it, presets, and what is refused."""

from __future__ import annotations

import pytest

from hybrimoe.errors import UsageError
from hybrimoe.machine.cards import ARCHITECTURES, all_cards
from hybrimoe.machine.cpus import FAMILIES, all_cpus, family_of
from hybrimoe.machine.describe import changed, describe, presets
from hybrimoe.machine.machine import SYSTEM_BYTES
from hybrimoe.machine.parts import find_card, find_cpu

GIB = 1 << 30


def test_a_machine_as_its_owner_would_describe_it() -> None:
    machine = describe("gpu=rtx4070ti,cpu=7900x,ram=ddr5-6000x2:96GiB,link=pcie4x8")
    assert machine.cards_text == "rtx4070ti" and machine.card_bytes == (12 * GIB,)
    assert machine.cards[0].bandwidth_bytes_per_s == 504e9
    assert (machine.cpu.n_cores, machine.cpu.isa) == (12, "avx512-vnni")
    assert machine.ram.peak_bytes_per_s == 96e9  # 6000 MT/s x 8 bytes x 2
    assert machine.ram_bytes == 96 * GIB - SYSTEM_BYTES
    assert machine.link is not None and machine.link.bytes_per_s == 12.5e9  # half of 16 lanes
    assert machine.assumed == ()


def test_unequal_cards() -> None:
    machine = describe("gpu=2*rtx3060+rtx3090:20GiB,cpu=5600x,ram=ddr4-3200x2:64GiB,link=pcie4")
    assert machine.cards_text == "2 x rtx3060 + rtx3090"
    assert machine.card_bytes == (12 * GIB, 12 * GIB, 20 * GIB)


def test_what_is_not_said_is_assumed_and_named() -> None:
    machine = describe("gpu=rtx3060")
    assert set(machine.assumed) == {"cpu", "ram", "link"}
    assert describe("gpu=rtx3060,cpu=5600x").assumed == ("ram", "link")
    assert describe("gpu=rtx3060,cpu=5600x,ram=ddr4,link=pcie4").assumed == ("ram",)  # its speed is not said
    assert describe("gpu=rtx3060,cpu=5600x,ram-gbs=40,link-gbs=20").assumed == ()
    # The link is what both ends have: a card of PCIe 4 on a CPU of PCIe 3.
    link = describe("gpu=rtx3060,cpu=i9-9900kf").link
    assert link is not None and link.generation == 3


def test_what_was_measured_replaces_estimates() -> None:
    machine = describe(
        "gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:32GiB,ram-gbs=41,gpu-gbs=310 GB/s,link-gbs=14.5,disk-gbs=6"
    )
    assert machine.ram.measured_bytes_per_s == 41e9
    assert machine.cards[0].measured_bytes_per_s == 310e9
    assert machine.link is not None and machine.link.bytes_per_s == 14.5e9
    assert machine.disk_rate == 6000


def test_a_card_that_the_table_lacks_is_given_by_its_data_sheet() -> None:
    machine = describe("gpu=rtx9090:40GiB,gpu-peak-gbs=2000,gpu-tflops=150,cpu=9950x")
    (card,) = machine.cards
    assert (card.memory_bytes, card.bandwidth_bytes_per_s, card.fp32_flops) == (40 * GIB, 2e12, 150e12)
    assert not card.is_known
    with pytest.raises(UsageError, match="data sheet of 'rtx9090' is incomplete"):
        describe("gpu=rtx9090,gpu-peak-gbs=2000")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 4090", "rtx4090"), ("4070 ti super", "rtx4070tisuper"), ("NVIDIA GeForce RTX 3080 Laptop GPU", None),
        ("RTX 3080 12GB", "rtx3080-12gb"), ("RTX PRO 6000", "rtxpro6000"), ("Radeon RX 7900 XTX", "rx7900xtx"),
        ("R9700", "r9700"), ("Instinct MI50", "mi50"), ("Tesla P40", "p40"), ("Arc B580", "arcb580"),
        ("RTX A6000", "rtxa6000"), ("rtx 5060 ti 16gb", "rtx5060ti-16gb"),
    ],
)  # fmt: skip
def test_cards_by_the_names_that_people_use(name: str, found: str | None) -> None:
    if found is None:
        with pytest.raises(UsageError, match="unknown card"):
            find_card(name)
    else:
        assert find_card(name).name == found


def test_a_variant_by_its_memory() -> None:
    assert find_card("RTX 2060 6GB").name == "rtx2060"
    assert find_card("rtx4090 48gb").memory_bytes == 48 * GIB
    assert find_card("rtx3080 20gb").memory_bytes == 20 * GIB  # not in the table: the card with that memory


@pytest.mark.parametrize(
    ("name", "family", "n_cores"),
    [
        ("Ryzen 9 7900X", "zen4", 12), ("i5-12600K", "alderlake", 6), ("Intel Core i7-14700K", "alderlake", 8),
        ("Core Ultra 9 285K", "arrowlake", 8), ("EPYC 7713", "zen3-epyc", 64), ("EPYC 9115/9135", "zen5-epyc", 16),
        ("Threadripper PRO 5975WX", "zen3-tr", 32), ("Xeon Gold 6248R", "skylake-xeon", 24), ("5600", "zen3", 6),
        ("Xeon E5-2680 v4", "haswell-xeon", 14), ("Xeon w5-3435X", "sapphire-w", 16), ("7-core", "unknown", 7),
        ("Ryzen AI Max+ 395", "strix-halo", 16), ("9900kf", "skylake", 8), ("unknown", "unknown", 8),
    ],
)  # fmt: skip
def test_processors_by_the_names_that_people_use(name: str, family: str, n_cores: int) -> None:
    cpu = find_cpu(name)
    assert (cpu.family, cpu.n_cores) == (family, n_cores)


def test_a_processor_that_the_table_lacks_takes_the_rest_from_its_family() -> None:
    cpu = find_cpu("Ryzen 7 7750X", 8)
    assert (cpu.family, cpu.n_cores, cpu.ghz) == ("zen4", 8, FAMILIES["zen4"].ghz)
    with pytest.raises(UsageError, match="unknown CPU") as caught:
        find_cpu("Ryzen 7 7750X")
    assert "cores=8" in caught.value.hint


def test_the_tables_are_sound() -> None:
    cards, cpus = list(all_cards()), list(all_cpus())
    assert len({c.name for c in cards}) == len(cards) > 150
    assert len({c.name for c in cpus}) == len(cpus) > 300
    for card in cards:
        assert card.architecture in ARCHITECTURES and find_card(card.name).name == card.name
        # Bytes per operation of real cards: a slip of a digit would leave this range.
        assert 0.005 < card.bandwidth_bytes_per_s / card.fp32_flops < 0.12, card.name
    for cpu in cpus:
        assert find_cpu(cpu.name).name == cpu.name
        assert 1.5 < cpu.ghz < 6 and 1 < cpu.n_cores <= 192


def test_the_table_agrees_with_its_families_patterns() -> None:
    """So a name that the table lacks finds the same family as its neighbours."""
    wrong = []
    for cpu in all_cpus():
        key = cpu.name.replace("-", "")
        if (found := family_of(key)) not in (cpu.family, None):
            wrong.append((cpu.name, found))
    # Ryzen and Core share some numbers; with their full names they differ.
    assert {family for _, family in wrong} <= {"zen1", "zen2", "zen3", "zen4", "zen5", "skylake", "haswell"}, wrong
    assert len(wrong) < 12, wrong


@pytest.mark.parametrize("name", presets())
def test_presets_are_descriptions(name: str) -> None:
    machine = describe(name)
    assert machine.name == name and machine.ram_bytes > 8 * GIB
    assert machine.description and machine.source


def test_parts_replace_those_of_a_preset() -> None:
    plain = describe("rtx4090-pcie4-ddr5")
    other = describe("rtx4090-pcie4-ddr5:link=pcie3,ram=ddr4-3200x2,vram=16GiB,cores=4")
    assert plain.link is not None and other.link is not None
    assert other.link.bytes_per_s == 11e9 < plain.link.bytes_per_s
    assert other.ram.peak_bytes_per_s == 51.2e9 and other.ram.n_bytes == plain.ram.n_bytes
    assert other.card_bytes == (16 * GIB,)
    assert other.cpu.speed == plain.cpu.speed / 2
    assert other.name.endswith("cores=4")
    assert describe("cpu-only-ddr5:gpu=rtx3060").link is not None
    assert describe("rtx3060-pcie4-ddr4:gpus=3").cards_text == "3 x rtx3060"
    assert changed(plain, "gpu=none").cards == () and changed(plain, "gpu=none").link is None


def test_two_sockets() -> None:
    one, two = describe("cpu=epyc7713,ram=ddr4-3200x8:256GiB"), describe("cpu=2*epyc7713,ram=ddr4-3200x16:512GiB")
    assert two.cpu.n_threads == 2 * one.cpu.n_threads


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("cray-1", "no such machine: 'cray-1'", "describe it"),
        ("rtx3060-pcie4", "no such machine", "rtx3060-pcie4-ddr4"),
        ("gpu=rtx4070tis", "unknown card 'rtx4070tis'", "rtx4070ti"),
        ("gpu=rtx3060,cpu=6809x", "unknown CPU '6809x'", "cores=8"),
        ("gpu=rtx3060,gpu=rtx3090", "gpu is given twice", "2\\*rtx3060"),
        ("gpu=rtx3060,colour=red", "names no part of a machine", "keys"),
        ("gpu=rtx3060,cou=5600x", "names no part", "did you mean cpu"),
        ("gpu=rtx3060,cpu", "not of the form key=value", "keys"),
        ("gpu=rtx3060,remote=rtx3060@10gbe", "names no part", "keys"),
        ("cpu=5600x,link=pcie4", "has no card to link to", "name one first"),
        ("gpu=none,vram=8GiB", "has no card, but vram speaks of one", "name one first"),
        ("gpu=rtx3060,link=pcie9", "unknown link 'pcie9'", "pcie3"),
        ("gpu=rtx3060,link=pcie4x3", "unknown link", "lanes"),
        ("ram=ddr5-6000x0,cpu=5600x", "memory channels=0 must be from 1 to", ""),
        ("ram=ddr5-60x2,cpu=5600x", "60 million transfers a second", "ddr5-6000"),
        ("ram=sdram,cpu=5600x", "not a kind of memory", "ddr5-6000x2:96GiB"),
        ("ram=ddr5-6000x2:96,cpu=5600x", "96 is not a memory's size", "unit"),
        ("ram=ddr5-6000x2:lots,cpu=5600x", "lots", "unit"),
        ("cpu=5600x,cores=0", "cores=0 must be from 1 to", ""),
        ("cpu=5600x,ghz=50", "ghz=50 must be from", ""),
        ("cpu=5600x,ram-gbs=-4", "ram-gbs=-4 must be from", "GB/s"),
        ("cpu=5600x,ram-gbs=nan", "ram-gbs=nan must be from", "GB/s"),
        ("cpu=5600x,ram-gbs=fast", "ram-gbs=fast is not a number", "GB/s"),
        ("gpu=0*rtx3060", "number of cards=0 must be from 1", ""),
        ("gpu=rtx3060,vram=12", "12 is not a memory's size", "unit"),
    ],
)
def test_bad_descriptions(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        describe(text)
    import re

    assert re.search(hint, caught.value.hint)
