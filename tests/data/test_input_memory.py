"""Host memory while a long data set is read: the process's size after its first samples and 50,000 samples
later."""

import json
import subprocess
import sys

import odd_files
import pytest
from patience import PATIENCE

from blip_fast.data.shards.shards import Sample, write_shards

pytest.importorskip("nvidia.dali", reason="the training input needs the extra `train`")

SAMPLES, WARM_UP = 50_000, 5_000
READ = """
import json, os, sys
from pathlib import Path
from blip_fast.data.input.pipeline import InputConfig, TrainInput
from blip_fast.data.input.sources import Source
source = TrainInput(InputConfig([Source("pictures", sys.argv[1])], image_size=32, batch_size=50, shuffle_buffer=2000,
                                threads=2))
keys, sizes = set(), {}
def endless():
    while True:
        yield from source
for read, batch in enumerate(endless(), start=1):
    keys.add(batch.keys[0])
    if read * 50 in (int(sys.argv[2]), int(sys.argv[3])):
        sizes[read * 50] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    if read * 50 == int(sys.argv[3]):
        break
print(json.dumps([len(keys), *sizes.values()]))
os._exit(0)
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_samples_read(tmp_path):
    """Less than 50 MB more after 50,000 samples, almost all different."""
    images = [odd_files.encoded(odd_files.picture(64, 48, seed=i), "JPEG") for i in range(100)]
    write_shards((Sample(f"{i:05d}", images[i % 100], {"captions": [f"picture {i}"]})
                  for i in range(SAMPLES)),
                 tmp_path, samples_per_shard=1000)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path), str(WARM_UP), str(WARM_UP + SAMPLES)],
                          capture_output=True, text=True, timeout=PATIENCE, check=True)
    batches, first, last = json.loads(done.stdout)
    print(f"\nRSS {first:.0f} MB after {WARM_UP:,} samples, {last:.0f} MB after {WARM_UP + SAMPLES:,}")
    assert batches > 900  # almost all different: 1.1 epochs
    assert last - first < 50
