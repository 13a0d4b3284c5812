"""Importers: each format's content arrives, and malformed files are refused with the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrimoe.errors import UsageError
from hybrimoe.trace.convert import write, write_imported
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.format import TraceFile, read
from hybrimoe.trace.importers import ImportOptions, import_files

MOE_BEYOND = (
    'Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,<s>,"[8, 2]"\n1,0,",","[0, 1]"\n3,0,<s>,"[5, 4]"\n'
    '3,0,",","[3, 9]"\n'
)
ROUTE = """# route_trace v1
# model=/m/qwen.gguf arch=x n_layer=2 n_expert=16 n_expert_used=2
# layer=0 expert_bytes=500 dense_bytes=7
# layer=1 expert_bytes=600 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency
0,0,0,0,0,3,0.75,0
0,0,0,0,1,4,0.25,0
0,0,1,0,1,6,0.5,0
0,0,1,0,0,5,0.5,0
0,0,1,1,0,1,1.0,0
0,0,1,1,1,2,0.0,0
1,1,0,0,0,7,0.5,0
1,1,0,0,1,8,0.5,0
1,1,0,1,0,9,0.5,0
1,1,0,1,1,15,0.5,0
"""


def put(tmp_path: Path, text: str, name: str = "a.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_moe_beyond(tmp_path: Path) -> None:
    second = put(tmp_path, MOE_BEYOND.replace('"[8, 2]"', '"[7, 6]"'), "b.csv")
    found = import_files([put(tmp_path, MOE_BEYOND), second], ImportOptions())
    assert found.experts.tolist() == [[[8, 2], [5, 4]], [[0, 1], [3, 9]], [[7, 6], [5, 4]], [[0, 1], [3, 9]]]
    assert found.prompt.tolist() == [0, 0, 1, 1]
    assert found.model.layers == (1, 3) and found.model.n_expert == 10
    assert "--n-expert" in found.notes[0]


def test_route_csv(tmp_path: Path) -> None:
    found = import_files([put(tmp_path, ROUTE)], ImportOptions())
    assert found.experts.tolist() == [[[3, 4], [-1, -1]], [[5, 6], [1, 2]], [[7, 8], [9, 15]]]
    assert found.prompt.tolist() == [0, 0, 1]
    assert found.is_decode is not None and found.is_decode.tolist() == [0, 0, 1]
    assert found.weights is not None and found.weights[0, 0].tolist() == [0.75, 0.25]
    assert found.model.name == "qwen" and found.model.expert_bytes == (500, 600) and found.model.n_expert == 16
    unknown = import_files([put(tmp_path, ROUTE.replace("0.75", "nan"))], ImportOptions())
    assert unknown.weights is None and "unknown" in unknown.notes[0]


def test_layer_csv_token_by_token(tmp_path: Path) -> None:
    text = "layer,expert\n0,1\n0,2\n1,3\n1,4\n0,5\n0,6\n1,7\n1,0\n"
    found = import_files([put(tmp_path, text)], ImportOptions(n_expert=8))
    assert found.experts.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 0]]]
    lists = "layer_id,expert_ids\n3,52 40\n4,1 2\n3,7 8\n4,3 4\n"
    assert import_files([put(tmp_path, lists)], ImportOptions()).experts.shape == (2, 2, 2)


def test_layer_csv_of_a_prompt(tmp_path: Path) -> None:
    """Layer by layer; the last layer has the last token alone."""
    text = "layer,expert\n" + "".join(f"0,{e}\n" for e in (1, 2, 3, 4)) + "1,5\n1,6\n"
    found = import_files([put(tmp_path, text)], ImportOptions(n_expert=8))
    assert found.experts.tolist() == [[[1, 2], [-1, -1]], [[3, 4], [5, 6]]]


def test_npz(tmp_path: Path) -> None:
    experts = np.array([[[0, 1], [255, 255]], [[2, 3], [1, 0]]], np.uint8)
    data: dict[str, Any] = {"experts": experts, "prompt_offsets": [0, 2], "n_expert": 4, "first_layer": 2, "model": "m"}
    np.savez(tmp_path / "a.npz", **data)
    found = import_files([tmp_path / "a.npz"], ImportOptions(expert_bytes=99))
    assert found.experts.tolist() == [[[0, 1], [-1, -1]], [[2, 3], [1, 0]]]
    assert found.model.layers == (2, 3) and found.model.expert_bytes == (99, 99) and found.model.name == "m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("hello\nworld\n", "has no known trace format"),
        ("layer,expert\n", "has no rows"),
        ("layer,expert\n0,x\n", "line 2: 'x' are no expert ids"),
        ("layer,expert\n0,-3\n", "line 2: '-3' are no expert ids"),
        ("layer,expert\n-1,3\n", "line 2: layer -1 is below 0"),
        ("layer,expert\n0,1\n0,2\n1,3\n1,4\n1,5\n", "line 2: 3 experts in layer 1 from here, top-k is 2"),
        ("layer,expert\n0,1,2\n", "line 2: 3 cells for 2 columns"),
        (MOE_BEYOND.replace('"[0, 1]"', '"[0]"'), "line 3: 1 experts, earlier rows have 2"),
        (MOE_BEYOND.replace('"[0, 1]"', '"[0, 0]"'), "line 3: '\\[0, 0\\]' are no expert ids"),
        (MOE_BEYOND + '3,0,x,"[1, 2]"\n', r"batch 0 has \[2, 3\] tokens in different layers"),
        (ROUTE.replace("0,0,0,0,1,4,0.25,0\n", ""), "turn 0, step 0, layer 0 has 1 of 2 experts"),
        (ROUTE.replace("0,0,0,0,1,4", "0,0,0,0,0,4"), "has slot 0 twice"),
        (ROUTE.replace("1,1,0,1,1,15", "1,2,0,1,1,15"), "phase 2 is neither"),
        (ROUTE.replace("0.75", "much"), "line 6: 'much' is no weight"),
    ],
)
def test_malformed_text(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        import_files([put(tmp_path, text)], ImportOptions())
    assert caught.value.exit_code == 3


def test_malformed_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    good: dict[str, Any] = {"experts": np.zeros((2, 1, 1), np.uint8), "prompt_offsets": [0, 2], "n_expert": 4}
    for change, message in (
        ({"experts": np.zeros((2, 1))}, "must be ids"),
        ({"prompt_offsets": [0, 3]}, "must rise from 0 to the 2 tokens"),
        ({"weights": np.zeros((2, 2, 1))}, "weights have shape"),
        ({"is_decode": np.zeros(3)}, "must have 2 entries"),
        ({"experts": np.array([[[1, 255]], [[0, 1]]], np.uint8)}, "token 0, layer 0 has fewer than 2 experts"),
    ):
        np.savez(path, **{**good, **change})
        with pytest.raises(TraceError, match=message):
            import_files([path], ImportOptions())
    np.savez(path, prompt_offsets=[0, 2])
    with pytest.raises(TraceError, match="lacks the array 'experts'"):
        import_files([path], ImportOptions())
    np.savez(path, **good)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TraceError, match="no sound"):
        import_files([path], ImportOptions())
    with pytest.raises(TraceError, match="no such file"):
        import_files([tmp_path / "absent.csv"], ImportOptions())


def test_what_the_user_says_must_fit(tmp_path: Path) -> None:
    path = put(tmp_path, MOE_BEYOND)
    with pytest.raises(UsageError, match="expert 9 is in the file, but there are 8 experts"):
        import_files([path], ImportOptions(n_expert=8))
    with pytest.raises(UsageError, match="unknown trace format 'xml'"):
        import_files([path], ImportOptions(), "xml")
    with pytest.raises(UsageError, match="different formats"):
        import_files([path, put(tmp_path, ROUTE, "b.csv")], ImportOptions())


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".trace"])
def test_round_trips(tmp_path: Path, demo: TraceFile, suffix: str) -> None:
    """A recorded trace written in every format and imported again routes alike."""
    path = tmp_path / f"a{suffix}"
    write(demo, path, without=() if suffix == ".trace" else ("scores", "lookahead"))
    if suffix == ".trace":
        again = read(path)
        assert again.scores is not None and demo.scores is not None
        np.testing.assert_array_equal(again.scores, demo.scores)
    else:
        write_imported(import_files([path], ImportOptions()), tmp_path / "b.trace")
        again = read(tmp_path / "b.trace")
        assert again.model.n_expert == demo.model.n_expert and again.model.expert_bytes == demo.model.expert_bytes
    np.testing.assert_array_equal(again.experts, demo.experts)
    np.testing.assert_array_equal(again.prompt_offsets, demo.prompt_offsets)
    np.testing.assert_array_equal(again.is_decode, demo.is_decode)
    np.testing.assert_allclose(again.weights, demo.weights, atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {path.name, *(["b.trace"] if suffix != ".trace" else [])}
    )


@pytest.mark.parametrize("method", ["bz2", "lzma"])
def test_damage_in_other_compressions(method: str, tmp_path: Path) -> None:
    """Found by atheris: zip archives may be packed in other ways than numpy's, whose damage is reported differently."""
    import io
    import zipfile

    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2 if method == "bz2" else zipfile.ZIP_LZMA) as archive:
        for name, array in (("experts", np.arange(400).reshape(50, 4, 2)), ("prompt_offsets", np.array([0, 50]))):
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    assert len(import_files([path], ImportOptions()).experts) == 50
    whole = path.read_bytes()
    begin = whole.index(b"experts.npy") + len(b"experts.npy")
    n_refused = 0
    for at in range(begin, begin + 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            import_files([path], ImportOptions())
        except TraceError as error:
            assert "no sound" in error.message
            n_refused += 1
    assert n_refused >= 50  # some bytes say what nobody asks, such as LZMA's version
