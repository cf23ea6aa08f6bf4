#!/usr/bin/env python3
"""Compares eager and exported Mask R-CNN (R50-FPN) in speed, memory, start-up time and file size.

Each contender runs in a separate process on one resized image, from pixels to boxes, scores,
classes and mask probabilities; none of them draws masks into the image. The contenders take turns,
so other work on the machine slows all of them equally:

  stock         detectron2's classes, eager
  plugin        this package's classes, eager
  torchscript   tools/export_model.py --format torchscript
  onnxruntime   tools/export_model.py --format onnx
  openvino      the same file, run by OpenVINO
  mayaku        mayaku's `convert-d2` and `export onnx` with the same weights. The file contains
                only backbone and FPN, which onnxruntime runs; mayaku's PyTorch code runs the rest.

The last two need packages that this project does not use. Create an environment for them and pass
its Python with --rivals. To share PyTorch and onnxruntime of this environment, put a .pth file with
the path of its packages into the new one:
  python -m venv rivals && rivals/bin/pip install mayaku openvino onnxruntime
  python benchmarks/deploy.py --rivals rivals/bin/python

The weights are random, and scaled so that the model returns its largest number of objects.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = "configs/coco/mask_rcnn_R_50_FPN_1x.yaml"
STOCK = [
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
]
RIVALS = ("openvino", "mayaku")
CONTENDERS = ("stock", "plugin", "torchscript", "onnxruntime", *RIVALS)

ANSWER = "answer: "

Run = Callable[[list[Any]], int]
"""Takes (C, H, W) float32 arrays and returns the number of objects found."""


def eager(folder: Path, opts: list[str]) -> Run:
    import torch
    from detectron2.config import CfgNode

    from mask_head_plugin import load_config
    from mask_head_plugin.engine.predictor import load_predictor

    opts = ["MODEL.WEIGHTS", str(folder / "model.pth"), "MODEL.DEVICE", "cpu", *opts]
    cfg: CfgNode = load_config(CONFIG, opts)
    if opts[4:]:  # loaded as in detectron2, without the plugin's memory format
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.modeling import build_model

        model = build_model(cfg).eval()
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    else:
        model = load_predictor(cfg).model.eval()

    @torch.no_grad()
    def run(images: list[Any]) -> int:
        batch = [{"image": torch.from_numpy(image)} for image in images]
        return sum(len(x) for x in model.inference(batch, do_postprocess=False))

    return run


def torchscript(folder: Path) -> Run:
    import torch
    import torchvision  # noqa: F401  # its operators are in the file

    model = torch.jit.load(folder / "torchscript" / "model.torchscript.pt")

    @torch.no_grad()
    def run(images: list[Any]) -> int:
        return sum(len(model(torch.from_numpy(image))[1]) for image in images)

    return run


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx(folder: Path, threads: int) -> Run:
    model = session(folder / "onnx" / "model.onnx", threads)
    return lambda images: sum(len(model.run(None, {"image": image})[1]) for image in images)


def openvino(folder: Path, threads: int) -> Run:
    from openvino import Core

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_PRECISION_HINT"] = "f32"
    model = Core().compile_model(folder / "onnx" / "model.onnx", "CPU", options)
    return lambda images: sum(len(model([image])[1]) for image in images)


def mayaku(folder: Path, threads: int) -> Run:
    import torch
    from mayaku import from_pretrained

    model = from_pretrained(str(folder / "mayaku.pth"), device="cpu").model
    graph, body = session(folder / "mayaku.onnx", threads), model.backbone
    names = [x.name for x in graph.get_outputs()]

    def features(image: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = graph.run(None, {"image": image.contiguous().numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    body.forward = features

    @torch.no_grad()
    def run(images: list[Any]) -> int:
        return sum(
            len(x["instances"]) for x in model([{"image": torch.from_numpy(i)} for i in images])
        )

    return run


def work(name: str, folder: Path, args: argparse.Namespace) -> None:
    """Runs a contender once for each line of standard input: the number of images to pass."""
    start = time.perf_counter()
    import numpy as np

    make: dict[str, Callable[[], Run]] = {
        "stock": lambda: eager(folder, STOCK),
        "plugin": lambda: eager(folder, []),
        "torchscript": lambda: torchscript(folder),
        "onnxruntime": lambda: onnx(folder, args.threads),
        "openvino": lambda: openvino(folder, args.threads),
        "mayaku": lambda: mayaku(folder, args.threads),
    }
    if name not in ("onnxruntime", "openvino"):
        import torch

        torch.set_num_threads(args.threads)
    image = np.load(folder / "image.npy")
    run = make[name]()
    tell(start_s=round(time.perf_counter() - start, 2))
    for line in sys.stdin:
        before = time.perf_counter()
        found = run([image] * int(line))
        seconds = time.perf_counter() - before
        tell(ms=1e3 * seconds, found=found, peak_mb=peak_megabytes_of_process())


def peak_megabytes_of_process() -> int:
    """Returns the peak memory of this program; ru_maxrss would include the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024)


def tell(**values: Any) -> None:
    print(ANSWER + json.dumps(values), flush=True)


class Worker:
    """A process that runs a contender."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        command = [python, "-W", "ignore", __file__, "--worker", name, "--folder", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.row: dict[str, Any] = {"contender": name}
        self.row |= self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # skips the output of packages
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
        raise RuntimeError(f"{self.row['contender']} ended without an answer")

    def run(self, count: int) -> float:
        """Runs ``count`` images in one call and returns the milliseconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.row["found"] = answer["found"] // count
        self.row[f"peak_mb_{count}"] = answer["peak_mb"]  # the largest so far
        milliseconds: float = answer["ms"]
        return milliseconds


def measure_all(workers: list[Worker], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the results of each worker. Workers take turns, so other work slows all equally."""
    for worker in workers:
        for _ in range(args.warm_up):
            worker.run(1)
    for count in sorted(args.images):
        times: list[list[float]] = [[] for _ in workers]
        for _ in range(max(args.repeats // count, 1)):
            for own, worker in zip(times, workers, strict=True):
                own.append(worker.run(count))
        for own, worker in zip(times, workers, strict=True):
            worker.row[f"ms_{count}"] = round(statistics.median(own), 1)
            print(worker.row, flush=True)
    for worker in workers:
        worker.process.communicate()
    return [worker.row for worker in workers]


def prepare(folder: Path, side: int, rivals: str | None) -> None:
    """Writes the weights, an image and all exported files to a folder."""
    import cv2
    import numpy as np
    import torch
    from detectron2.modeling import build_model

    from mask_head_plugin import load_config
    from mask_head_plugin.deploy.export import ExportOptions, export_model

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (side // 32, side // 24, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, (side * 4 // 3, side), interpolation=cv2.INTER_CUBIC)
    np.save(folder / "image.npy", pixels.transpose(2, 0, 1).astype(np.float32))
    cv2.imwrite(str(folder / "image.png"), pixels[: side // 2, : side // 2])
    cfg = load_config(CONFIG, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *STOCK])
    model = build_model(cfg).eval()
    make_detecting(model, torch.from_numpy(np.load(folder / "image.npy")[:, ::3, ::3].copy()))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    opts = ["MODEL.WEIGHTS", str(folder / "model.pth")]
    for name in ("onnx", "torchscript"):
        images = [str(folder / "image.png")]
        print(export_model(CONFIG, opts, folder / name, ExportOptions(name), images))
    if rivals:
        cfg.MODEL.WEIGHTS = opts[1]
        stock_keys = cfg.clone()
        stock_keys.defrost()
        (folder / "stock.yaml").write_text(stock_keys.dump())
        convert = [str(folder / "model.pth"), "--d2-config", str(folder / "stock.yaml")]
        for command in (
            ["convert-d2", *convert, "--output", str(folder / "mayaku.pth")],
            ["export", "onnx", str(folder / "mayaku.pth"), "--output", str(folder / "mayaku.onnx")],
        ):
            subprocess.run([rivals, "-m", "mayaku.cli", *command], check=True)


def make_detecting(model: Any, image: Any) -> None:
    """Scales the last layers of a random model so its outputs vary like those of a trained one."""
    import torch

    heads, rpn = model.roi_heads.box_predictor, model.proposal_generator.rpn_head
    with torch.no_grad():
        for module in model.backbone.bottom_up.modules():
            if type(module).__name__ == "FrozenBatchNorm2d":
                module.weight.fill_(0.5)
        for layer, deviation in (
            *((rpn.objectness_logits, 2.0), (rpn.anchor_deltas, 0.3)),
            *((heads.cls_score, 1.5), (heads.bbox_pred, 1.5)),
        ):
            outputs: list[torch.Tensor] = []
            hook = layer.register_forward_hook(lambda *io, kept=outputs: kept.append(io[2]))
            model.inference([{"image": image}], do_postprocess=False)
            hook.remove()
            layer.weight *= deviation / torch.cat([x.flatten() for x in outputs]).std()


def size_mb(folder: Path, name: str) -> float:
    files = {
        "torchscript": ["torchscript/model.torchscript.pt"],
        "onnxruntime": ["onnx/model.onnx"],
        "openvino": ["onnx/model.onnx"],
        "mayaku": ["mayaku.pth", "mayaku.onnx"],  # the heads are in the first file
    }.get(name, ["model.pth"])
    return round(sum((folder / file).stat().st_size for file in files) / 1e6, 1)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws times, memory, start-up time and file sizes."""
    from matplotlib.figure import Figure

    from mask_head_plugin.pages.plots import COLOURS, label_bars, save_plot

    figure = Figure(figsize=(14, 3.5), layout="constrained")
    counts = sorted(int(key[3:]) for key in rows[0] if key.startswith("ms_"))
    titles = {
        **{f"ms_{count}": f"ms for {count} image{'s' * (count > 1)}" for count in counts},
        f"peak_mb_{counts[0]}": "peak memory, MB",
        "start_s": "start-up, s",
        "file_mb": "file, MB",
    }
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        bars = axes.barh(
            [row["contender"] for row in rows], [row[key] for row in rows], color=COLOURS[0]
        )
        label_bars(axes, bars, "{:,.4g}")
        axes.margins(x=0.2)
        axes.set_title(title, fontsize=9)
    axes.invert_yaxis()
    save_plot(figure, path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/deploy.json"))
    parser.add_argument(
        "--rivals", metavar="PYTHON", help="Python of the environment with the rivals"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4, 8], help="images per call")
    parser.add_argument(
        "--side", type=int, default=800, help="shorter side of the image, in pixels"
    )
    parser.add_argument(
        "--repeats", type=int, default=4, help="runs per measurement, divided by images per call"
    )
    parser.add_argument("--warm-up", type=int, default=2, help="runs before the measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--folder", type=Path, help="keep and reuse the exported files here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.worker:
        work(args.worker, args.folder, args)
        return
    from measure import machine, write_results

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "onnx" / "model.json").exists():
            prepare(folder, args.side, args.rivals)
        workers = [
            Worker(name, args.rivals if name in RIVALS else sys.executable, folder, args.threads)
            for name in args.only
            if args.rivals or name not in RIVALS
        ]
        rows = measure_all(workers, args)
        for row in rows:
            row["file_mb"] = size_mb(folder, row["contender"])
    if len(rows) > 1:
        first = f"ms_{args.images[0]}"
        for row in rows:
            row["times_first"] = round(rows[0][first] / row[first], 2)
            print(f"{row['contender']:12} {row[first]:>10} ms  {row['times_first']:>6} x")
    results = {**machine("cpu"), "threads": args.threads, "side": args.side, "rows": rows}
    write_results(results, args.output, plot)


if __name__ == "__main__":
    main()
