"""Runs of `blip-fast train` on a few drawn scenes, each in its own process."""

import json
import os
import subprocess
import sys

from patience import PATIENCE

from blip_fast.scenes.scenes import write_scenes

RECIPE = """
name: tiny
model:
  vision: {image_size: 32, patch_size: 16, width: 32, layers: 1, heads: 1}
  text: {width: 32, layers: 1, heads: 1, mlp_width: 64, max_positions: 64, dropout: 0.1}
  embed_dim: 16
tokenizer: {vocab_size: 200}
data: {test_split: null, train_split: null, crop_scale: [0.5, 1.0], flip: false, rand_augment: false, shuffle_buffer: 8,
       threads: 1}
objective: {queue_size: 20}
schedule: {kind: cosine, lr: 1.0e-3, warmup_steps: 2, epochs: 100, max_steps: 8}
runtime: {batch_size: 4, precision: float32, log_every: 1, save_every: 4, zero_stage: 1}
"""


def drawn_scenes(folder, count=20):
    """A folder to train on: scenes and the recipe of a tiny run."""
    write_scenes(folder, count, "train", seed=0, noise=0.0, image_size=32)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def train_command(folder, runs, *options):
    """The command of a run and its environment."""
    command = [sys.executable, "-m", "blip_fast", "train", "--config", str(folder / "recipe.yaml"),
               "--data.root", str(folder), "--runs", str(runs), *options]
    return command, os.environ | {"OMP_NUM_THREADS": "1"}


def blip_fast_train(folder, runs, *options):
    command, environment = train_command(folder, runs, *options)
    return subprocess.run(command, capture_output=True, text=True, env=environment,
                          timeout=PATIENCE, check=False)


def losses(runs):
    rows = [json.loads(line) for line in (runs / "tiny" / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["itc"], row["itm"], row["lm"]) for row in rows]
