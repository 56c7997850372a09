"""What the numbers of an evaluation are called, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

from visualcloze_deft.evaluation.encoders.load import text_title, title

PERCEIVED = ("segmentation", "uniformer", "object_masks")  # roles of classes in flat colours
COMPARED = {  # role -> metric of two maps of it
    "canny": "canny_f1",
    "depth": "depth_rmse",
    "normal": "normals_angle",
    **dict.fromkeys(PERCEIVED, "miou"),
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a table calls a number, and whether more is better. digits: after the point at most."""

    title: str
    digits: int
    up: bool


def metric_of(name: str, *, tolerance: int = 0) -> Metric:
    """The title of a metric.

    >>> metric_of("image/efficientnet-lite0").title
    'image similarity (efficientnet-lite0)'
    >>> metric_of("canny_f1", tolerance=1).title
    'canny F1 (within 1 px)'
    """
    kind, _, encoder = name.partition("/")
    known = {
        "psnr": Metric(title="PSNR, dB", digits=2, up=True),
        "ssim": Metric(title="SSIM", digits=3, up=True),
        "lpips": Metric(title="LPIPS (alex)", digits=3, up=False),
        "canny_f1": Metric(title=f"canny F1 (within {tolerance} px)", digits=3, up=True),
        "depth_rmse": Metric(title="depth RMSE, 0-255", digits=2, up=False),
        "normals_angle": Metric(title="normals angle, degrees", digits=2, up=False),
        "miou": Metric(title="segmentation mIoU", digits=3, up=True),
        "preserved": Metric(title="error outside the hole, 0-255", digits=2, up=False),
        "image": Metric(title=title(encoder), digits=3, up=True),
        "text": Metric(title=text_title(encoder), digits=3, up=True),
        "box": Metric(title=f"placed object to its views ({encoder})", digits=3, up=True),
        "box_hit": Metric(title=f"box hit rate ({encoder})", digits=3, up=True),
        "drift": Metric(title=f"drift ({encoder})", digits=3, up=False),
        "drift_pixels": Metric(title="drift, mean difference 0-255", digits=2, up=False),
    }
    return known[kind]
