"""Settings of a run: what they refuse, what follows from them, every spelling of an optimizer."""

import pytest
import torch

from litgpt.training.arguments import EvalArgs, TrainArgs
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.schedule import Schedule


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_batch_size", 0),
        ("micro_batch_size", -1),
        ("max_steps", 0),
        ("lr_warmup_steps", -1),
        ("min_lr", -0.1),
        ("lr_warmup_fraction", 1.5),
        ("beta2", 1.0),
        ("keep_last", 0),
        ("lr_cooldown_fraction", 2),
        ("lr_schedule", "'cosinus'"),
        ("epochs", 0),
        ("epochs", -0.5),
    ],
)
def test_wrong_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"train\.{field}={value}"):
        TrainArgs(**{field: value.strip("'") if isinstance(value, str) else value})


def test_settings_of_another_schedule_are_refused():
    with pytest.raises(ValueError, match=r"train\.lr_decay_iters=5: with train.lr_schedule=constant nothing decays"):
        TrainArgs(lr_schedule="constant", lr_decay_iters=5)
    with pytest.raises(ValueError, match=r"train\.lr_cooldown_fraction=0.2 is for .*warmup-stable-decay; it is linear"):
        TrainArgs(lr_schedule="linear", lr_cooldown_fraction=0.2)
    with pytest.raises(ValueError, match=r"eval\.patience=0"):
        EvalArgs(patience=0)


def test_eval_example_is_a_number_or_a_name():
    assert EvalArgs(evaluate_example="3").evaluate_example == 3
    with pytest.raises(ValueError, match=r"eval.evaluate_example='last'"):
        EvalArgs(evaluate_example="last")


def test_indivisible_batch_names_every_option():
    with pytest.raises(ValueError) as error:
        TrainArgs(global_batch_size=10, micro_batch_size=4).accumulation(devices=2)
    message = str(error.value)
    for part in ("global_batch_size=10", "micro_batch_size` 4", "2 device(s)", "8 or 16", "`devices`"):
        assert part in message
    with pytest.raises(ValueError, match="global_batch_size` to 4,"):
        TrainArgs(global_batch_size=2, micro_batch_size=4).accumulation(1)
    assert TrainArgs(global_batch_size=16, micro_batch_size=4).accumulation(2) == 2


def test_gradient_accumulation_sets_the_global_batch_or_is_refused():
    train = TrainArgs(global_batch_size=512, micro_batch_size=2, gradient_accumulation_iters=16)
    train.set_batch_by_accumulation(devices=2, default_global_batch_size=512)
    assert (train.global_batch_size, train.accumulation(2)) == (64, 16)
    # The seeds' `--train.micro_batch_size 1 --train.global_batch_size 32 --train.gradient_accumulation_iters 32`
    same = TrainArgs(global_batch_size=32, micro_batch_size=1, gradient_accumulation_iters=32)
    same.set_batch_by_accumulation(1, 512)
    assert same.global_batch_size == 32
    clash = TrainArgs(global_batch_size=64, micro_batch_size=1, gradient_accumulation_iters=32)
    with pytest.raises(ValueError, match=r"gradient_accumulation_iters=32 .*= 32 sequences.*global_batch_size is 64"):
        clash.set_batch_by_accumulation(1, 512)


def test_whichever_limit_ends_first():
    def steps(**limits):
        return TrainArgs(global_batch_size=10, micro_batch_size=1, **limits).total_steps(10, samples_per_epoch=55)

    assert steps(max_steps=7) == 7
    assert steps(max_tokens=501) == 6
    assert steps(max_tokens=551) == 7  # the sixth step is a half: an epoch ends there
    assert steps(epochs=2) == 12
    assert steps(epochs=0.1) == 1
    assert steps(epochs=0.2) == 2
    assert steps(epochs=1.5) == 9
    assert steps(max_steps=7, max_tokens=500, epochs=2) == 5
    assert steps(max_time=3.0) is None
    assert TrainArgs(max_tokens=5).total_steps(None, None) is None  # the loop counts tokens itself
    with pytest.raises(ValueError, match="Nothing ends this run"):
        steps()
    with pytest.raises(ValueError, match=r"train\.epochs=2: the data does not say how long"):
        TrainArgs(epochs=2).total_steps(100, None)


def test_schedule_values():
    schedule = Schedule(warmup_steps=4, decay_steps=14, min_lr=0.1)
    rates = [schedule.learning_rate(step, 1.0) for step in range(16)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]  # the first step already learns, the warmup's last is at the peak
    assert rates[5:13] == sorted(rates[5:13], reverse=True)
    assert schedule.learning_rate(4 + 9 / 2, 1.0) == pytest.approx(0.55)  # half way down
    assert rates[13] == rates[14] == rates[15] == pytest.approx(0.1)
    assert Schedule(0, 10, 0.5).learning_rate(3, 0.2) == pytest.approx(0.2)  # min_lr above the peak: no decay
    assert Schedule(3, None).learning_rate(1000, 0.2) == 0.2
    assert Schedule(10, 5).learning_rate(4, 1.0) == 0.5  # a run that ends in its warmup


def test_other_schedules():
    linear = Schedule(2, 12, 0.1, "linear")
    assert [linear.learning_rate(step, 1.0) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert [linear.learning_rate(step, 1.0) for step in (5, 11, 12)] == pytest.approx([0.7, 0.1, 0.1])
    stable = Schedule.of(TrainArgs(lr_warmup_steps=4, min_lr=0.0, lr_schedule="warmup-stable-decay"), 50)
    rates = [stable.learning_rate(step, 1.0) for step in range(52)]
    assert rates[3:46] == [1.0] * 43  # the last 5 of 50 steps go down
    assert rates[46:] == pytest.approx([0.75, 0.5, 0.25, 0, 0, 0])
    given = TrainArgs(lr_schedule="warmup-stable-decay", lr_cooldown_fraction=0.5, lr_decay_iters=20)
    assert Schedule.of(given, 50).stable_until == 10
    constant = Schedule.of(TrainArgs(lr_schedule="constant", lr_warmup_steps=3), 10)
    assert [constant.learning_rate(step, 0.3) for step in (0, 2, 9, 99)] == pytest.approx([0.1, 0.3, 0.3, 0.3])
    with pytest.raises(ValueError, match="warmup-stable-decay needs to know when the run ends"):
        Schedule.of(TrainArgs(lr_schedule="warmup-stable-decay"), None)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "warmup-stable-decay"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_the_first_step_learns(name, warmup):
    schedule = Schedule.of(TrainArgs(lr_schedule=name, lr_warmup_steps=warmup, min_lr=0.0), 100)
    assert schedule.learning_rate(0, 1.0) == pytest.approx(1 / max(warmup, 1))


def test_schedule_from_arguments():
    assert Schedule.of(TrainArgs(lr_warmup_steps=7), 100) == Schedule(7, 100, 6e-5)
    assert Schedule.of(TrainArgs(lr_warmup_fraction=0.1, lr_decay_iters=50), 95) == Schedule(10, 50, 6e-5)
    with pytest.raises(ValueError, match="lr_warmup_fraction` needs a run whose length is known"):
        Schedule.of(TrainArgs(lr_warmup_fraction=0.1), None)


def test_schedule_keeps_the_groups_apart():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert Schedule(4).apply(optimizer, 0) == 0.25
    Schedule(4).apply(optimizer, 1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.05]


def test_groups_keep_their_ratio_down_to_min_lr():
    """LoRA+: B learns 16 times as fast as A, at the end, too."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 16e-3)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = Schedule(warmup_steps=2, decay_steps=10, min_lr=1e-4)
    for step in range(12):
        assert schedule.apply(optimizer, step) == optimizer.param_groups[0]["lr"]
        assert optimizer.param_groups[1]["lr"] == pytest.approx(16 * optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups[1]["lr"] == pytest.approx(16e-4)


DEFAULT = OptimizerSpec("torch.optim.AdamW", {"lr": 4e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]})


def test_build_makes_what_was_asked_for():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    adam = OptimizerSpec("AdamW", {"lr": "6e-4", "betas": [0.9, "0.95"]}).build(
        [parameter]
    )  # YAML 1.1 reads 6e-4 as text
    assert (adam.defaults["lr"], adam.defaults["betas"], adam.defaults["fused"]) == (6e-4, (0.9, 0.95), True)
    sgd = OptimizerSpec("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9, "foreach": True}).build([parameter])
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["fused"] is None
    own = OptimizerSpec(f"{__name__}.OwnOptimizer", {"lr": 0.5}).build([parameter])
    assert (type(own), own.defaults["lr"]) == (OwnOptimizer, 0.5)
    assert OptimizerSpec("Rprop").build([parameter]).defaults["lr"] == 0.01


class OwnOptimizer(torch.optim.SGD):
    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, lr=lr)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (OptimizerSpec("AdmW"), "not an optimizer class.*Did you mean 'AdamW'"),
        (OptimizerSpec("no.such.Module"), "cannot import no.such"),
        (OptimizerSpec("torch.nn.Linear"), "not an optimizer class"),
        (OptimizerSpec("AdamW", {"weigth_decay": 0.1}), "takes no 'weigth_decay'.*Did you mean 'weight_decay'"),
        (OptimizerSpec("AdamW", {"lr": -1}), "optimizer=AdamW with lr=-1: Invalid learning rate"),
    ],
)
def test_wrong_optimizers_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        spec.build([torch.nn.Parameter(torch.zeros(1))])


def test_train_args_are_other_spellings():
    train = TrainArgs(learning_rate=2e-5, beta2=0.99)
    spec = DEFAULT.with_train_args(train, DEFAULT)
    assert spec.init_args == {"lr": 2e-5, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    assert DEFAULT.init_args["lr"] == 4e-4
    same = OptimizerSpec("AdamW", {"lr": "2e-5"}).with_train_args(TrainArgs(learning_rate=2e-5), DEFAULT)
    assert same.init_args["lr"] == 2e-5
    with pytest.raises(ValueError, match=r"train.learning_rate` says 2e-05, but `optimizer.lr` says 0.1"):
        OptimizerSpec("AdamW", {"lr": 0.1}).with_train_args(train, DEFAULT)
    with pytest.raises(ValueError, match="takes no 'betas'"):
        OptimizerSpec("SGD", {"lr": 2e-5}).with_train_args(train, DEFAULT)
