"""Precisions where the hardware has no bfloat16: not chosen, and said and replaced where asked for."""

import pytest
import torch

from litgpt.devices import precision
from litgpt.devices.precision import bf16_slowdown, default_precision, inference_precision, settle_bf16
from litgpt.parallel.fabric import make_fabric, precision_of


@pytest.fixture
def cpu(monkeypatch):
    """A CPU of given abilities: its own arithmetic for bfloat16, oneDNN's products in it, and how slow they are."""

    def fake(arithmetic: bool, products: bool, slowdown: float = 240.0) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: arithmetic)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: arithmetic)
        monkeypatch.setattr(precision, "multiplies_bf16", lambda: products)
        monkeypatch.setattr(precision, "bf16_slowdown", lambda: slowdown)

    return fake


@pytest.mark.parametrize("abilities", [(False, False), (False, True), (True, True)])
def test_what_is_chosen_by_default(cpu, abilities):
    cpu(*abilities)
    assert default_precision("cpu") == "32-true"
    assert inference_precision(torch.device("cpu")) == ("bf16-true" if abilities[0] else "32-true")


@pytest.mark.parametrize(
    ("asked", "memory"),
    [("bf16-mixed", ""), ("bf16-true", ", and weights, gradients and optimizer state take twice the memory")],
)
def test_avx2_alone_trains_in_float32_and_says_why(cpu, asked, memory):
    cpu(False, False)
    settled, note = settle_bf16(asked, "cpu")
    assert settled == "32-true"
    assert note == (
        f"precision={asked}: this CPU has no arithmetic for bfloat16, in which a product takes 240.0 times as long here "
        f"as in float32. So the run is in 32-true{memory}."
    )


def test_products_in_float32_within_are_slower_and_done(cpu):
    cpu(False, True, slowdown=4.2)
    settled, note = settle_bf16("bf16-true", "cpu")
    assert settled == "bf16-true"
    assert "a product takes 4.2 times as long here as in float32. precision=32-true is the quicker one." in note


@pytest.mark.parametrize("asked", ["32-true", "bf16-true", "bf16-mixed"])
def test_nothing_is_measured_where_it_makes_no_difference(cpu, asked, monkeypatch):
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: pytest.fail("measured"))
    monkeypatch.setattr(precision, "computes_bf16", lambda: True)
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    assert settle_bf16(asked, "cpu") == (asked, None)
    monkeypatch.setattr(precision, "computes_bf16", lambda: False)
    assert settle_bf16(asked, "cuda") == (asked, None)
    assert settle_bf16("32-true", "cpu") == ("32-true", None)


def test_the_fabric_is_in_the_precision_that_was_settled(cpu, capsys, monkeypatch):
    cpu(False, False)
    monkeypatch.setattr("litgpt.parallel.fabric.accelerator", lambda: "cpu")
    assert precision_of(make_fabric(1, 1, "bf16-mixed")) == "32-true"
    assert "this CPU has no arithmetic for bfloat16" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert precision_of(make_fabric(1, 1, "bf16-mixed")) == "32-true"
    assert capsys.readouterr().err == ""
    assert precision_of(make_fabric(1, 1)) == "32-true"


def test_the_slowdown_is_a_ratio_of_times():
    assert 0 < bf16_slowdown(times=1) < 1e6
