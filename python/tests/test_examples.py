"""The examples run and find what they promise."""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "python" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_mistakes_of_the_port_are_found():
    verdict = example("judge_port").main()
    assert [c.name for c in verdict.causes] == ["image-scale", "suffix-positions"]
    assert verdict.unexplained is None and not verdict


def test_the_port_without_them_is_right():
    verdict = example("judge_port").main(())
    assert verdict and not verdict.causes


def test_openpis_loop():
    pytest.importorskip("openpi_client")
    assert example("openpi_loop").main(steps=12).shape == (12, 14)


def test_how_fast_a_server_answers(tiny):
    pytest.importorskip("openpi_client")
    serve = [sys.executable, "-m", "pi0", "serve", tiny, "--robot", "aloha", "--steps", "1", "--threads", "1"]
    place = ["--host", "127.0.0.1", "--port", "0", "--log-format", "json"]
    server = subprocess.Popen([*serve, *place], stderr=subprocess.PIPE, text=True)
    try:
        found = (re.search(r'"address":"127.0.0.1:(\d+)', line) for line in server.stderr)
        port = next(int(match[1]) for match in found if match)
        times, seconds, lost = example("latency").measure("127.0.0.1", port, clients=2, requests=10)
    finally:
        server.terminate()
        assert server.wait(60) == 0
    assert times.shape == (20, 2) and lost == 0 and seconds > 0
    assert (times[:, 0] > times[:, 1]).all() and (times[:, 1] > 0).all()
