"""The pipeline's stages, one file each: load, run, save, track.

A stage is a module of this package, a DVC stage and an MLproject entry point of the same name. ``STAGES`` is the only
list of them in code; tests hold ``dvc.yaml`` and ``MLproject`` to it.
"""

STAGES = (
    "fetch", "prune", "quantize", "importance", "search", "pareto", "build", "evaluate", "export", "register", "report",
)  # fmt: skip
PAPER = ("table", "ablation")  # the paper's tables: commands of their own, outside DVC's graph
