"""Real photographs, in a two-minute form of recipes/flickr8k.yaml: two ranks, ZeRO 2,
from the folder to the report."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import blip_train
from patience import PATIENCE

RECIPE = Path(blip_train.__file__).parent / "recipes" / "flickr8k.yaml"
STEPS = 120


def test_two_minutes_on_photographs(data_root, tmp_path):
    command = [sys.executable, "-m", "blip_fast", "train", "--config", str(RECIPE), "--data.root",
               str(data_root / "flickr8k"), "--runs", str(tmp_path), "--schedule.max_steps", str(STEPS),
               "--model.vision.image_size", "64", "--model.vision.layers", "2", "--model.text.layers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "flickr8k"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == STEPS
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["lm"] < rows[0]["lm"] - 1.5
    metrics = json.loads((run / "metrics.json").read_text())
    # Better than knowing neither image nor context.
    assert metrics["caption_loss"] < metrics["unigram_cross_entropy"]
    assert {"i2t_r10", "t2i_r10"} <= set(metrics)
    page = (run / "report.html").read_text()
    assert page.count("<img") == 24 and "Captions" in page
