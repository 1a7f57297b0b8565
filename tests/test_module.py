import pytest
import torch
from lightning.pytorch import Callback, Trainer

import tokenpool
from tokenpool.training.data import DigitsDataModule
from tokenpool.training.module import ClassificationModule
from tokenpool.training.recipe import Recipe
from tokenpool.training.soft_selection import SoftSelection

TINY = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "weight_init": "jax"}


def create(downsampler="none", keep=None) -> torch.nn.Module:
    torch.manual_seed(0)
    return tokenpool.create_model("deit_digits_patch2_16", downsampler, keep, carry=False, **TINY)


def trainer(tmp_path, **options) -> Trainer:
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **silent, **options)


@pytest.mark.slow
def test_training_learns_and_metrics_are_right(tmp_path) -> None:
    data = DigitsDataModule(Recipe(batch_size=128))
    module = ClassificationModule(create("wkmedoids", [12, 6, 0]), 10, Recipe(learning_rate=5e-3, warmup_epochs=1))
    fitted = trainer(tmp_path, max_epochs=15)
    fitted.fit(module, datamodule=data)
    measured = fitted.test(module, datamodule=data, verbose=False)[0]
    assert measured["test_top1"] > 0.4  # by chance it would be 0.1

    images, labels = data.test_set.tensors
    with torch.no_grad():
        logits = module.eval()(images)
    assert measured["test_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)
    assert torch.equal(module.correct, logits.argmax(1) == labels) and module.ema_correct is None
    among_five = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert measured["test_top5"] == pytest.approx(among_five, abs=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert measured["test_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_search_drives_late_ranks_out(tmp_path) -> None:
    model = create(SoftSelection)
    module = ClassificationModule(
        model, 10, Recipe(learning_rate=1e-3, retention_penalty=1.0, retention_learning_rate=0.05)
    )
    trainer(tmp_path, max_epochs=10).fit(module, datamodule=DigitsDataModule(Recipe(batch_size=128)))
    weights = torch.stack([layer.retention for layer in tokenpool.soft_selection.layers(model)])
    assert weights.min() >= 0 and weights.max() <= 1
    assert weights.sum() < 0.5 * weights.numel()


def test_every_parameter_has_its_learning_rate(tmp_path) -> None:
    module = ClassificationModule(
        create(SoftSelection), 10, Recipe(learning_rate=1e-3, weight_decay=0.1, retention_learning_rate=0.5)
    )
    fitted = trainer(tmp_path, max_steps=1)
    fitted.fit(module, datamodule=DigitsDataModule(Recipe(batch_size=512)))
    groups = fitted.optimizers[0].param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(module.model.parameters()))
    rates = {group["initial_lr"]: group for group in groups}
    assert set(rates) == {1e-3, 0.5}
    assert len(rates[0.5]["params"]) == 3 and rates[0.5]["weight_decay"] == 0
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(module.model.pos_embed), id(module.model.cls_token), id(module.model.norm.bias)} <= spared
    assert id(module.model.head.weight) not in spared


def test_a_loss_that_is_not_finite_stops_training(tmp_path) -> None:
    model = create()
    torch.nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        trainer(tmp_path, max_epochs=1).fit(ClassificationModule(model, 10), datamodule=DigitsDataModule())


def test_more_classes_than_five_are_not_needed() -> None:
    assert ClassificationModule(create(), num_classes=2).test_metrics["top5"].top_k == 2


class Weights(Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen.append({name: value.clone() for name, value in module.model.state_dict().items()})


def test_the_moving_average_is_one_and_is_tested_apart(tmp_path) -> None:
    data, weights = DigitsDataModule(Recipe(batch_size=128)), Weights()
    module = ClassificationModule(create(), 10, Recipe(learning_rate=5e-3, warmup_epochs=0, ema_decay=0.8))
    expected = {name: value.clone() for name, value in module.model.state_dict().items()}
    fitted = trainer(tmp_path, max_epochs=1, callbacks=[weights])
    fitted.fit(module, datamodule=data)
    assert len(weights.seen) == 10
    for seen in weights.seen:
        expected = {name: 0.8 * expected[name] + 0.2 * seen[name] for name in expected}
    averaged = module.ema.module.state_dict()
    assert all(torch.allclose(averaged[name], expected[name], atol=1e-6) for name in expected)
    measured = fitted.test(module, datamodule=data, verbose=False)[0]
    images, labels = data.test_set.tensors
    found = (("test", module.model, module.correct), ("test_ema", module.ema.module, module.ema_correct))
    for name, model, correct in found:
        with torch.no_grad():
            logits = model.eval()(images)
        assert torch.equal(correct, logits.argmax(1) == labels)
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert measured[f"{name}_loss"] == pytest.approx(loss, rel=1e-4)
        assert measured[f"{name}_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)
    assert measured["test_loss"] != pytest.approx(measured["test_ema_loss"], rel=1e-3)


class Targets(Callback):
    """The targets of each batch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.seen.append(batch[1])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_batch_is_mixed_at_a_ratio_of_its_own(tmp_path, accumulated: int) -> None:
    targets = Targets()
    options = {"max_epochs": 2, "limit_train_batches": 4, "accumulate_grad_batches": accumulated}
    module = ClassificationModule(create(), 10)
    trainer(tmp_path, callbacks=[targets], **options).fit(
        module, datamodule=DigitsDataModule(Recipe(batch_size=128, mixup=0.8))
    )
    ratios = [round(batch.amax(1).min().item(), 5) for batch in targets.seen]
    assert len(ratios) == len(set(ratios)) == 8
