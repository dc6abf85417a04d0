"""How well a composition did: the numbers of the paper, and those that tell the truth.

Each metric is a pure function and a `torchmetrics.Metric`, whose result is the same in one process and in several.
"""

from __future__ import annotations

from ..pictures import picture_files, read_picture
from .alignment import ImageAlignment, TextAlignment, image_alignment, text_alignment
from .benchmark_config import BenchmarkConfig
from .benchmark_report import write_report
from .benchmark_run import run_benchmark
from .encoders import ImageEncoder, TextImageEncoder, VisionBackbone, embed_images, load_clip
from .evaluate import Evaluation, evaluate_folder
from .gate_report import GateReport, GateStatistics, gate_statistics
from .pictures import Pictures
from .presence import ConceptPresence, concept_presence
from .region import Detector, RegionAlignment, oracle_detector, reference_regions, region_alignment

__all__ = [
    "BenchmarkConfig",
    "ConceptPresence",
    "Detector",
    "Evaluation",
    "GateReport",
    "GateStatistics",
    "ImageAlignment",
    "ImageEncoder",
    "Pictures",
    "RegionAlignment",
    "TextAlignment",
    "TextImageEncoder",
    "VisionBackbone",
    "concept_presence",
    "embed_images",
    "evaluate_folder",
    "gate_statistics",
    "image_alignment",
    "load_clip",
    "oracle_detector",
    "picture_files",
    "read_picture",
    "reference_regions",
    "region_alignment",
    "run_benchmark",
    "text_alignment",
    "write_report",
]
