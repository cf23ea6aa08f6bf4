"""to_channels_last: weight gradients from contiguous maps equal those of detectron2's Conv2d."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import fake_gpu, relative_error, small_config
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from made_training import losses_and_gradients, make_batch
from torch import nn
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mask_head_plugin.modeling import channels_last, to_channels_last
from mask_head_plugin.modeling.channels_last import WeightGradientFromCopies


@pytest.fixture(autouse=True)
def avx2(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


class LayoutsOfWeightGradients(TorchDispatchMode):
    """Records whether each weight gradient was computed from contiguous maps."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
            self.contiguous.append(all(x.is_contiguous() for x in args[:3]))
        return func(*args, **(kwargs or {}))


def weight_gradients_are_contiguous(conv, channels=16, side=128, **to):
    conv = nn.Sequential(copy.deepcopy(conv))
    to_channels_last(conv)
    x = torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    with LayoutsOfWeightGradients() as layouts, torch.autocast("cpu", **to):
        conv(x).sum().backward()
    (contiguous,) = layouts.contiguous
    return contiguous


def test_maps_are_copied_only_if_large_and_for_3_x_3_kernels(monkeypatch):
    off = {"enabled": False}
    large = Conv2d(16, 8, 3, padding=1)
    assert weight_gradients_are_contiguous(large, **off)
    assert weight_gradients_are_contiguous(Conv2d(16, 8, 3, stride=2, bias=False), **off)
    assert not weight_gradients_are_contiguous(large, side=127, **off)
    assert not weight_gradients_are_contiguous(Conv2d(16, 8, 1), **off)
    assert not weight_gradients_are_contiguous(Conv2d(16, 16, 3, groups=16), **off)
    assert not weight_gradients_are_contiguous(
        large, enabled=True
    )  # bfloat16 uses oneDNN's kernels
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not weight_gradients_are_contiguous(large, **off)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "bias", "x"])
@pytest.mark.parametrize("stride", [1, 2])
def test_results_and_gradients_equal_an_ordinary_convolution(frozen, stride):
    torch.manual_seed(0)
    more = {"padding": 2, "dilation": 2, "norm": nn.GroupNorm(2, 4), "activation": nn.ELU()}
    ordinary = Conv2d(16, 4, 3, stride=stride, **more)
    changed = nn.Sequential(copy.deepcopy(ordinary))
    to_channels_last(changed)
    x = torch.randn(2, 16, 128, 130)
    results = []
    for conv in (ordinary, changed[0]):
        inputs = {"x": x.clone(), **dict(conv.named_parameters())}
        for name, value in inputs.items():
            value.requires_grad_(name != frozen)
        y = conv(inputs["x"])
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape))
        results.append([y, *[value.grad for value in inputs.values()]])
    for expected, result in zip(*results, strict=True):
        assert (expected is None) == (result is None)
        if expected is not None:
            assert relative_error(result, expected) < 1e-5


def test_a_model_has_the_same_losses_gradients_and_state(monkeypatch):
    monkeypatch.setattr(channels_last, "MIN_ELEMENTS", 1)
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "MODEL.RESNETS.NORM", "FrozenBN")
    model = build_model(cfg)
    changed = copy.deepcopy(model)
    to_channels_last(changed)
    again = pickle.loads(pickle.dumps(copy.deepcopy(changed)))
    kinds = [type(x) for x in again.modules()]
    assert kinds.count(WeightGradientFromCopies) > 20
    assert list(again.state_dict()) == list(model.state_dict())
    losses, gradients = losses_and_gradients(model, make_batch())
    new_losses, new_gradients = losses_and_gradients(again, make_batch())
    assert losses.keys() == new_losses.keys() and gradients.keys() == new_gradients.keys()
    for name, loss in losses.items():
        assert relative_error(new_losses[name], loss) < 1e-5
    for name, gradient in gradients.items():
        assert relative_error(new_gradients[name], gradient) < 2e-3


def test_second_derivatives_are_correct(monkeypatch):
    monkeypatch.setattr(channels_last, "MIN_ELEMENTS", 1)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    arguments = (1, 1), (1, 1), (1, 1)
    assert gradgradcheck(
        lambda x, weight: channels_last._Convolution.apply(x, weight, None, *arguments), (x, weight)
    )


def test_evaluation_tracing_and_scripting_still_work():
    conv = nn.Sequential(Conv2d(16, 4, 3, padding=1)).eval()
    x = torch.randn(1, 16, 128, 128)
    expected = conv(x)
    to_channels_last(conv)
    scripted = torch.jit.script(copy.deepcopy(conv))
    assert type(conv[0]) is WeightGradientFromCopies
    assert torch.allclose(conv(x), expected, atol=1e-5)
    traced = torch.jit.trace(conv, x)
    assert "PythonOp" not in str(traced.inlined_graph)
    with torch.no_grad():
        assert torch.equal(scripted(x), conv(x)) and torch.equal(traced(x), conv(x))


def test_inputs_that_only_detectron2_supports_still_work():
    conv = nn.Sequential(Conv2d(16, 4, 3, padding="same"), Conv2d(4, 16, 3, padding=1))
    x = torch.randn(2, 16, 128, 128)
    expected = conv(x)
    to_channels_last(conv)
    for y in (conv(x), conv(x[0])[None]):
        assert torch.allclose(y, expected[: len(y)], atol=1e-5)
        y.sum().backward()


def test_functional_gradients_are_the_same(monkeypatch):
    conv = Conv2d(3, 2, 3, padding=1)
    x = torch.randn(1, 3, 4, 4)

    def loss(parameters):
        return torch.func.functional_call(conv, parameters, x).square().sum()

    parameters = dict(conv.named_parameters())
    expected = torch.func.grad(loss)(parameters)
    monkeypatch.setattr(channels_last, "MIN_ELEMENTS", 1)
    conv.__class__ = WeightGradientFromCopies
    for name, gradient in torch.func.grad(loss)(parameters).items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_only_gpus_with_tensor_cores_for_float32_use_channels_last(
    capability, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    changes = []
    monkeypatch.setattr(Conv2d, "to", lambda _self, **options: changes.append(options))
    with fake_gpu():
        conv = Conv2d(3, 4, 3, device="cuda")
        to_channels_last(conv)
    assert type(conv) is Conv2d
    assert changes == ([{"memory_format": torch.channels_last}] if expected else [])
