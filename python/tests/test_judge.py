"""Dumps, and what is made of them."""

import json
import subprocess
import sys

import numpy as np
import pytest

import pi0

RUN = "mixed_masks_b2"


def read(path):
    """The tensors of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    types = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, end = (8 + size + at for at in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[start:end], types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


@pytest.fixture
def recorder(golden):
    """What lerobot's own π0 computed, as somebody records it."""
    inputs = read(golden / f"{RUN}.inputs.safetensors")
    recorder = pi0.Recorder(format="f32", source="lerobot")
    recorder.inputs(
        images=[inputs[f"image_{c}"] for c in range(inputs["image_mask"].shape[1])],
        image_masks=inputs["image_mask"],
        tokens=inputs["tokens"],
        token_masks=inputs["token_mask"],
        state=inputs["state"],
        noise=inputs["noise"],
    )
    for name, tensor in read(golden / f"{RUN}.outputs.safetensors").items():
        recorder[name] = tensor
    return recorder


def test_lerobots_own_is_right(golden, recorder, tmp_path):
    verdict = pi0.judge(golden, recorder)
    assert verdict and not verdict.causes and verdict.first is None, str(verdict)
    assert verdict["actions"].pcc > 0.999999 and len(verdict.taps) > 20
    page = tmp_path / "page.html"
    verdict.html(page)
    text = page.read_text()
    assert "Is this π0?" in text and "http" not in text and "<script" not in text


def test_what_is_wrong_is_shown(golden, recorder):
    recorder["actions"] = recorder["actions"] * 1.5
    verdict = pi0.judge(golden, recorder)
    assert not verdict and verdict.first == "actions" and not verdict.causes
    assert verdict.unexplained == "actions" and "FAIL" in str(verdict)


def test_other_noise_is_noticed(golden, recorder):
    recorder["inputs.noise"] = recorder["inputs.noise"][:, ::-1]
    verdict = pi0.judge(golden, recorder)
    assert not verdict and any("noise" in note for note in verdict.notes)


def test_where_operations_ran_feeds_coverage(golden, recorder):
    recorder.ran("attention", "suffix.layer0", "host", seconds=0.01, transfer_seconds=0.001, bytes=1000, flop=1000)
    recorder.ran("linear", "suffix.layer1", seconds=0.001, bytes=1000, flop=1000)
    verdict = pi0.judge(golden, recorder)
    places = {t.place for t in verdict.taps if t.name.startswith("suffix.layer")}
    assert {"host", "device"} <= places
    assert verdict.coverage["roadmap"][0]["op"] == "attention"


def test_the_command_line_judges_the_same_file(golden, recorder, tmp_path):
    path, page = tmp_path / "dump.safetensors", tmp_path / "page.html"
    recorder.save(path)
    run = [sys.executable, "-m", "pi0", "check", str(golden), "--against", str(path), "--html", str(page)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and "agree" in done.stdout, done.stdout + done.stderr
    assert page.exists()


def test_dumps_that_cannot_be_judged(golden, recorder, tmp_path):
    with pytest.raises(pi0.DumpError):
        recorder["x"] = np.zeros(3, np.complex64)
    with pytest.raises(pi0.DumpError):
        recorder[3] = np.zeros(3)
    with pytest.raises(pi0.DumpError):
        pi0.Recorder(format="f7")
    with pytest.raises(pi0.DumpError, match="inputs"):
        empty = pi0.Recorder()
        empty["actions"] = np.zeros(3)
        pi0.judge(golden, empty)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(pi0.DumpError):
        pi0.judge(golden, broken)
    with pytest.raises(pi0.DumpError):
        pi0.record(object()).__enter__()
    with pytest.raises(pi0.OptionError, match="f7"):
        pi0.judge(golden, recorder, format="f7")
