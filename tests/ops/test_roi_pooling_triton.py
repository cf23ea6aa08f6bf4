"""The CUDA kernel: interpreted on the CPU, compiled for two GPUs, and run on a GPU."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import load_script, load_triton_kernels, relative_error

from mask_head_plugin import ops
from mask_head_plugin.machine import peak_megabytes

triton = pytest.importorskip("triton")
roi_pooling_operator = pytest.importorskip("mask_head_plugin.ops.roi_pooling_operator")

HALVES = (torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SCALES = (0.25, 0.125)


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.cuda)])
def operator(request):
    """Pools in Triton's interpreter or on a GPU; inputs and results are on the CPU."""
    if request.param == "cuda":
        return on_gpu
    return request.getfixturevalue("interpreted_operator")


def on_gpu(maps, rois, levels, *options, device="cuda:0"):
    maps, rois, levels = [x.to(device) for x in maps], rois.to(device), levels.to(device)
    return roi_pooling_operator.multilevel_roi_align(maps, rois, levels, *options).cpu()


def make_maps(dtype=torch.float32, layout=torch.channels_last, channels=5):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, channels, *hw, generator=generator)
        .to(dtype)
        .contiguous(memory_format=layout)
        for hw in ((12, 15), (6, 8))
    ]


def make_rois():
    generator = torch.Generator().manual_seed(1)
    rois = torch.rand(7, 5, generator=generator) * 40
    rois[:, 3:] = rois[:, 1:3] + torch.rand(7, 2, generator=generator) * 30
    rois[:, 0] = torch.arange(7) % 2
    rois[1, 3] = rois[1, 1] - 5  # inverted
    rois[2, 1:] = torch.tensor([-30.0, -20, 90, 70])  # across the border
    rois[3, 1:] = 900  # off the map, without area
    return rois, torch.tensor([0, 0, 1, 1, 0, 1, 0])


def with_gradients(pool, maps):
    """Returns the pooled RoIs, and the gradients of their weighted sum with respect to the maps."""
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in maps]
    pooled = pool(inputs)
    weights = torch.linspace(-1, 1, pooled.numel()).view(pooled.shape)
    return [pooled, *torch.autograd.grad((pooled.float() * weights).sum(), inputs)]


def assert_equal_to_the_cpu_operator(operator, maps, rois, levels, size, scales, ratio, aligned):
    options = (size, scales, ratio, aligned)
    actual = with_gradients(lambda x: operator(x, rois, levels, *options), maps)
    wide = [x.float() for x in maps]
    expected = with_gradients(lambda x: ops.roi_align(x, rois, *options, levels=levels), wide)
    # The kernel sums in another order. In half precision, it rounds only the result.
    tolerance = 5e-6 if maps[0].dtype == torch.float32 else torch.finfo(maps[0].dtype).eps
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == maps[0].dtype
        assert relative_error(mine.float(), theirs) <= tolerance


@pytest.mark.parametrize(("aligned", "layout"), [(True, LAYOUTS[0]), (False, LAYOUTS[1])])
@pytest.mark.parametrize("ratio", [0, 2])
def test_equals_the_cpu_operator(ratio, aligned, layout, operator):
    maps, options = make_maps(layout=layout), ((3, 2), SCALES, ratio, aligned)
    assert_equal_to_the_cpu_operator(operator, maps, *make_rois(), *options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_maps_are_summed_in_float32(dtype, layout, operator):
    maps = make_maps(dtype, layout, channels=3)
    assert_equal_to_the_cpu_operator(operator, maps, *make_rois(), (2, 2), SCALES, 0, True)


@pytest.mark.parametrize("channels", [128 + 2, 256])
def test_more_channels_than_fit_a_block(channels, operator):
    maps, (rois, levels) = make_maps(channels=channels), make_rois()
    options = ((1, 2), SCALES, 1, True)
    assert_equal_to_the_cpu_operator(operator, maps, rois[:3], levels[:3], *options)


@pytest.mark.parametrize("size", [7, 14])
def test_sides_that_are_multiples_of_the_number_of_bins(size, operator):
    """Rounding errors in side / bins, a whole number, must not change the number of samples."""
    gpu = operator is on_gpu
    sides = torch.arange(1, 65 if gpu else 4) * float(size)
    rois = torch.zeros(len(sides), 5)
    rois[:, 1], rois[:, 3], rois[:, 4] = 1, 1 + sides, size if gpu else 0.01
    maps = [torch.randn(1, 2, size + 1, 64 * size + 2 if gpu else 3 * size + 2)]
    levels = torch.zeros(len(sides), dtype=torch.int64)
    options = ((size, size) if gpu else (1, size), (1.0,), 0, True)
    assert_equal_to_the_cpu_operator(operator, maps, rois, levels, *options)


@pytest.mark.parametrize("ratio", [0, 2], ids=["adaptive", "far apart"])
def test_bins_taller_than_a_tile(ratio, operator):
    """Bins are 9 cells high. Adaptive samples read all of these cells; two samples miss most."""
    rois = torch.tensor([[0.0, 1.3, 0.6, 3.9, 18.4], [0.0, 3, 19, 1, 2]])
    levels = torch.zeros(2, dtype=torch.int64)
    options = ((2, 1), (1.0,), ratio, True)
    maps = [torch.randn(1, 2, 20, 6)]
    assert_equal_to_the_cpu_operator(operator, maps, rois, levels, *options)


def test_boxes_with_huge_coordinates_and_levels_without_boxes(operator):
    rois = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [1, 1e30, 0, 2e30, 9], [0, -40, -40, -20, -20]])
    levels = torch.ones(3, dtype=torch.int64)
    maps = make_maps(channels=2)
    assert_equal_to_the_cpu_operator(operator, maps, rois, levels, (2, 2), SCALES, 0, True)


def test_at_most_five_maps_are_accepted(operator):
    maps = [torch.randn(1, 3, 4, 5) for _ in range(6)]
    rois = torch.tensor([[0.0, 0, 0, 4, 3]]).repeat(5, 1)
    levels, scales = torch.arange(5), (1.0, 0.9, 0.8, 0.7, 0.6)
    assert_equal_to_the_cpu_operator(operator, maps[:5], rois, levels, (1, 2), scales, 1, True)
    with pytest.raises(ValueError, match="got 6 feature maps and 5 scales"):
        operator(maps, rois, levels, (1, 2), scales, 1, True)
    with pytest.raises(ValueError, match="1 to 5"):
        operator(maps, rois, levels, (1, 2), (*scales, 0.5), 1, True)


def test_without_rois_the_result_is_empty_and_differentiable(operator):
    maps, (rois, levels) = [x.requires_grad_() for x in make_maps()], make_rois()
    pooled = operator(maps, rois[:0], levels[:0], (2, 2), SCALES, 2, True)
    pooled.sum().backward()
    assert pooled.shape == (0, 5, 2, 2) and maps[0].grad.abs().max() == 0


def test_strided_levels_and_rois_are_accepted(operator):
    maps, (rois, levels) = make_maps(channels=3), make_rois()
    expected = operator(maps, rois, levels, (2, 2), SCALES, 1, True)
    strided = levels.int().repeat_interleave(2)[::2], rois.repeat(1, 2)[:, :5]
    actual = operator(maps, strided[1], strided[0], (2, 2), SCALES, 1, True)
    assert torch.equal(actual, expected)


def test_inconsistent_arguments_are_refused(operator):
    maps, (rois, levels) = make_maps(channels=3), make_rois()
    options = ((2, 2), SCALES, 1, True)
    with pytest.raises(ValueError, match="must agree in N, C, type"):
        operator([maps[0], maps[1].half()], rois, levels, *options)
    with pytest.raises(ValueError, match="must agree in N, C, type"):
        operator([x.double() for x in maps], rois, levels, *options)
    with pytest.raises(ValueError, match=r"rois must be \(R, 5\)"):
        operator(maps, torch.zeros(7, 6), levels, *options)


def test_compilers_see_one_differentiable_operator(interpreted_operator):
    """torch.compile and torch.export rely on the operator's schema, fake kernel and autograd."""
    maps = [torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(2)]
    rois, levels = torch.tensor([[0.0, 0.5, 0.5, 3, 2]]), torch.ones(1, dtype=torch.int32)
    operator = torch.ops.mask_head_plugin.multilevel_roi_align.default
    torch.library.opcheck(operator, (maps, rois, levels, [1, 2], [1.0, 0.9], 1, True))

    def pool(features):
        return interpreted_operator(features, rois, levels, (1, 2), (1.0, 0.9), 1, True)

    graph = torch.compile(pool, backend="eager", fullgraph=True)
    assert torch.equal(graph(maps), pool(maps))


@pytest.mark.cuda
def test_more_rois_than_a_grid_axis_allows():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(66_000, 2, generator=generator) * 10
    index = torch.zeros(66_000, 1)
    rois = torch.cat([index, corner, corner + 1 + corner.flip(1) / 3], dim=1)
    levels, options = torch.zeros(66_000, dtype=torch.int64), ((2, 2), (1.0,), 0, True)
    feature = torch.randn(1, 1, 12, 12, generator=generator)
    actual = on_gpu([feature], rois, levels, *options)
    expected = ops.roi_align([feature], rois, *options, levels=levels)
    assert relative_error(actual, expected) <= 5e-6


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_kernel_runs_on_the_gpu_of_the_maps():
    maps, (rois, levels), options = make_maps(), make_rois(), ((2, 2), SCALES, 2, True)
    actual = on_gpu(maps, rois, levels, *options, device="cuda:1")
    assert torch.equal(actual, on_gpu(maps, rois, levels, *options))


@pytest.mark.cuda
def test_a_cuda_graph_can_capture_the_operator():
    """A capture fails if the operator waits for the device or copies to it."""
    maps, (rois, levels) = [x.cuda() for x in make_maps()], (x.cuda() for x in make_rois())
    arguments = maps, rois, levels, (2, 2), SCALES, 2, True
    expected = roi_pooling_operator.multilevel_roi_align(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = roi_pooling_operator.multilevel_roi_align(*arguments)
    graph.replay()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backward", [False, True])
def test_each_column_is_visited_once_per_row_of_bins(backward, triton_interpreter, monkeypatch):
    """Counts the cells of one channel that are read or added to.

    A kernel without tiles would read 4 cells per sample.
    """
    kernels = load_triton_kernels("interpreted")
    visits, tile = [], kernels._tile

    def counting(*arguments):
        visits.append((arguments[-1].handle.data != 0).sum())  # weights of the tile's cells
        return tile(*arguments)

    monkeypatch.setattr(kernels, "_tile", counting)
    bins, samples, cells = 7, 3, 21.0 - 1e-3
    rois = torch.tensor([[0, 2.2, 2.2, 2.2 + cells, 2.2 + cells]])
    maps, pooled = [torch.zeros(1, 1, 30, 30)], torch.zeros(1, bins, bins, 1)
    launch = kernels.add_gradients if backward else kernels.pool
    launch(maps, pooled, rois, torch.zeros(1, dtype=torch.int32), (1.0,), 0, True)
    t = 2.2 - 0.5 + (np.arange(bins * samples) + 0.5) * cells / bins / samples
    touched = np.stack([np.floor(t), np.floor(t) + 1], 1).reshape(bins, -1)
    per_bin = sum(len(set(row)) for row in touched)
    assert sum(visits) == per_bin * len(set(touched.flat))
    assert sum(visits) < 0.4 * 4 * (bins * samples) ** 2


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "fp32"), (90, "fp32"), (90, "fp16"), (90, "bf16")]
)
def test_the_kernel_compiles_for_gpus_that_are_not_present(
    capability, dtype, backward, monkeypatch
):
    """Checks machine code from Triton's assembler for an A100 (sm_80) and an H100 (sm_90)."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = load_script("benchmarks/triton_kernels.py")
    compiled = report.compile_kernel(report.Variant(capability, dtype, backward))
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx and compiled.asm["cubin"]
    assert "add.rn.f32" in ptx and bool(re.search(r"\b(atom|red)\.global", ptx)) == backward
    # A side of 21 cells has ceil(21 / 7) = 3 samples; 21 * (1 / 7), rounded twice, would give 4.
    assert re.search(r"div\.rn(\.ftz)?\.f32", ptx)
    approximate = re.findall(r"\b(?:div\.full|div\.approx|rcp|fma)\S*", ptx)
    assert not approximate, "sample counts and positions must equal the CPU's"
    # Loads of cells, stores of bins and atomic additions of gradients use vectors of channels.
    code = report.machine_code(compiled)
    assert code["spilled"] == 0
    if backward:
        assert max(code["loads"]) == (128 if dtype == "fp32" else 64)  # four values
        if capability == 90:  # an A100 has no vector atomics
            assert all("F32x4" in name for name in code["atomics"])
    else:
        assert code["loads"][128] >= 4 and list(code["stores"]) == [128]


def test_the_estimated_memory_traffic_stays_within_bounds():
    """The benchmark's row is for 512 boxes in each of two images, 7 x 7 bins, adaptive samples."""
    report = load_script("benchmarks/triton_kernels.py")
    work = report.work_row(512, 7, 0, "fp32")
    assert work["by samples, 1000"] >= 2.5 * work["cells, 1000"]
    assert 0.05 <= work["forward at least, ms"] <= 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_need_no_more_memory_than_the_maps(dtype, interpreted_operator):
    """Half-precision maps also need memory for float32 sums."""
    sides, channels = ((64, 96), (32, 48)), 32
    maps = [torch.zeros(1, channels, *x, dtype=dtype, requires_grad=True) for x in sides]
    rois, levels = torch.tensor([[0.0, 1, 1, 9, 9]]), torch.zeros(1, dtype=torch.int64)
    pooled = interpreted_operator(maps, rois, levels, (1, 1), SCALES, 1, True).sum()
    found = []
    peak = peak_megabytes(lambda: found.append(torch.autograd.grad(pooled, maps)), "cpu")
    elements = sum(x.numel() for x in maps)
    bytes_needed = elements * (4 if dtype == torch.float32 else 4 + 2)
    assert elements * 4 <= peak * 1e6 < 1.05 * bytes_needed
