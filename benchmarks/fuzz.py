"""Random networks, random masks: each pruned exactly or refused, none wrong.

    python benchmarks/fuzz.py --networks 2000

The networks come from the strategy of the tests (tests/channels/networks.py): residuals, gates,
dense connections, chunks, shuffles, strided slices, grouped and depthwise and transposed
convolutions, raw parameters, literal sizes. Exit code 1 if one is wrong; it is printed.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.channels.networks import networks
from tests.channels.test_exact import attempt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the removed channels are not zero")
    outcomes: Counter[str] = Counter()
    worst = 0.0

    @seed(args.seed)
    @settings(
        max_examples=args.networks,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        model=networks(), mask=st.integers(0, 2**31), empty=st.sampled_from((0.0, 0.2))
    )  # fmt: skip
    def fuzz(model: nn.Sequential, mask: int, empty: float) -> None:
        nonlocal worst
        outcome, distance = attempt(model, mask, empty)
        outcomes[outcome] += 1
        worst = max(worst, distance)
        if outcome == "wrong":
            print(f"WRONG by {distance:.1e}, mask seed {mask}, {empty}: {model}")

    fuzz()
    print(f"{dict(outcomes)}, largest distance {worst:.1e} of the output's scale")
    return int(outcomes["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
