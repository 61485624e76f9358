"""The losses of a small run on tests/story.txt."""

from __future__ import annotations

import shlex

# The first 20 losses of conftest's SMALL with these options, without and with dropout
GOLDEN_OPTIONS = shlex.split(
    "--seed=7 --learning_rate=1e-2 --min_lr=1e-3 --warmup_iters=5 --lr_decay_iters=20 --max_iters=20"
)
# fmt: off
GOLDEN = [4.08589, 4.05756, 3.97546, 3.87237, 3.77442, 3.65297, 3.57394, 3.48082, 3.38577, 3.35405, 3.25607,
          3.21734, 3.2155, 3.04288, 3.1351, 3.12059, 3.06235, 3.17819, 3.07913, 3.02923]
GOLDEN_DROPOUT = [4.08257, 4.06411, 3.98948, 3.88697, 3.78362, 3.66521, 3.58819, 3.48895, 3.39787, 3.36339, 3.25931,
                  3.22286, 3.21993, 3.049, 3.14018, 3.12454, 3.06729, 3.18024, 3.08338, 3.06985]
# fmt: on
