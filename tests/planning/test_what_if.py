"""`--vary`: what other parts, settings and quantisations would bring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hybrimoe.errors import UsageError
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.machine.describe import describe
from hybrimoe.planning import Asked, Request, Setting
from hybrimoe.planning.plots import speed_plot
from hybrimoe.planning.what_if import Variant, parse_axes, variants, with_experts_in

Header = Callable[[str], Path]
MACHINE = describe("gpu=rtx3060,cpu=7900x,ram=ddr5-4800x2:64GiB,link=pcie4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GgufModel:
    """The header of Qwen3-30B-A3B's first eight layers."""
    from make_header_model import PRESETS, write_header

    path = tmp_path_factory.mktemp("what-if") / "qwen3.gguf"
    return inspect(write_header(path, PRESETS["qwen3-30b-a3b"], n_layers=8), header_only=True)


def plans(model: GgufModel, *axes: str, request: Request | None = None) -> list[Variant]:
    asked = Asked(request or Request())
    return list(variants(model, Setting(n_ctx=4096), MACHINE, asked, parse_axes(axes)))


def decode(one: Variant) -> float:
    assert one.plan.stock is not None
    return one.plan.stock[1].per_s


def test_faster_memory(model: GgufModel) -> None:
    found = plans(model, "ram=ddr5-4800x2,ddr5-8000x2", "cmoe=1")
    assert [one.values for one in found] == [
        {"ram": "ddr5-4800x2", "cmoe": "1"}, {"ram": "ddr5-8000x2", "cmoe": "1"},
    ]  # fmt: skip
    assert decode(found[0]) < decode(found[1])
    assert found[1].plan.machine.ram.mts == 8000
    assert found[1].plan.machine.ram.n_bytes == MACHINE.ram.n_bytes  # its size stays


def test_layers_of_experts_on_the_cpu(model: GgufModel) -> None:
    found = plans(model, "ncmoe=0:8:4")
    assert [one.values["ncmoe"] for one in found] == ["0", "4", "8"]
    assert decode(found[0]) > decode(found[1]) > decode(found[2])


def test_every_combination_the_last_axis_fastest(model: GgufModel) -> None:
    found = plans(model, "vram=8GiB,16GiB", "ub=256,512")
    assert [tuple(one.values.values()) for one in found] == [
        ("8GiB", "256"), ("8GiB", "512"), ("16GiB", "256"), ("16GiB", "512"),
    ]  # fmt: skip
    assert [one.plan.setting.n_ubatch for one in found] == [256, 512, 256, 512]


def test_a_smaller_quantisation(model: GgufModel) -> None:
    smaller = with_experts_in(model, "IQ2_XXS")
    n_weights = sum(t.n_elements for layer in model.moe_layers for t in layer.expert_tensors)
    assert smaller.expert_bytes == n_weights // 256 * 66
    assert smaller.moe_layers[0].bytes_per_expert * 128 == smaller.moe_layers[0].expert_bytes
    assert smaller.dense_bytes == model.dense_bytes
    found = plans(model, "quant=q8_0,q4_k", "cmoe=1")
    assert decode(found[0]) < decode(found[1])


def test_settings(model: GgufModel) -> None:
    kv = plans(model, "ctk=f16,q8_0", "c=4096,8192")
    assert kv[1].plan.needs.kv_bytes == 2 * kv[0].plan.needs.kv_bytes > 2 * kv[2].plan.needs.kv_bytes
    deep = plans(model, "depth=0,4000")
    assert decode(deep[0]) > decode(deep[1])


def test_a_picture(model: GgufModel) -> None:
    figure = speed_plot(plans(model, "ncmoe=0,8"), model.name)
    assert len(figure.axes) == 2 and "decode" in figure.axes[0].get_ylabel()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["ncmoe"], "not of the form"), (["colour=red"], "called 'colour'"), (["ncmo=3"], "called 'ncmo'"),
        (["ncmoe=1,2", "ncmoe=3"], "varied twice"), (["ncmoe=many"], "must be a whole number"),
        (["ncmoe=9:3:1"], "not a range"), (["c=0"], "must be a whole number"), (["quant=Q9"], "no quantisation 'Q9'"),
        (["ctk=int3"], "is none of"), (["cmoe=yes"], "must be 0 or 1"), (["c=1:4000:1"], "not a range"),
        (["ub=1:200:1", "depth=1,2,3"], "more than 256"),
    ],
)  # fmt: skip
def test_bad_axes(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_axes(texts)


def test_a_part_that_is_unknown_is_refused(model: GgufModel) -> None:
    with pytest.raises(UsageError, match="not a kind of memory"):
        plans(model, "ram=sdram")
