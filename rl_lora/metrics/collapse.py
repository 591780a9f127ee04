"""Signs that a policy has stopped reading its problems: one reply to nearly all of them, or nothing left to explore.

Rewards and accuracy cannot show either: where one answer pays often, giving it always looks like learning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rl_lora.metrics.records import Record, mean
from rl_lora.metrics.samples import Sample

NEARLY_ALL = 0.9
"""This share of equal replies, or of groups without signal, is called nearly all."""
MIN_PROBLEMS = 8
"""Different problems below which equal replies say nothing."""
WINDOW = 5
"""Steps over which training records are averaged."""
LOW_ENTROPY = 0.01
"""Nats a token: below it, and below a tenth of what it was, sampling gives the same tokens nearly always."""


def most_common_reply(samples: Sequence[Sample]) -> tuple[str, float] | None:
    """The reply that most samples give, and its share of all samples.

    None for fewer than MIN_PROBLEMS problems that differ in their text: equal prompts may well have equal replies.
    """
    if len({sample["observations"][0] for sample in samples if sample.get("observations")}) < MIN_PROBLEMS:
        return None
    replies = Counter(" ".join("\n".join(sample["completions"]).split()) for sample in samples)
    (reply, count), *_ = replies.most_common(1)
    return reply, count / len(samples)


def run_warnings(before: Sequence[Sample], after: Sequence[Sample], train: Sequence[Record]) -> list[str]:
    """The warnings of a run, on its first and last held-out samples and on the records of its steps."""
    replies = reply_warning(after, before)
    return [*([replies] if replies else []), *training_warnings(train)]


def reply_warning(samples: Sequence[Sample], before: Sequence[Sample] = ()) -> str | None:
    """The warning about held-out samples of a trained adapter that are nearly all equal; None if they are not.

    `before`: samples of the same problems before training, or the base's, for comparison.
    """
    found, earlier = most_common_reply(samples), most_common_reply(before)
    if found is None or found[1] < NEARLY_ALL:
        return None
    reply, share = found
    shown = repr(reply if len(reply) <= 60 else f"{reply[:59]}…") if reply else "an empty text"
    compared = f" (before, the most common reply was {earlier[1]:.0%})" if earlier else ""
    return (
        f"{share:.0%} of the held-out replies are the same, {shown}{compared}: accuracy and reward are then those of "
        "one answer that pays often, not of solving problems. Use problems whose answers differ, or reward what needs "
        "the problem"
    )


def training_warnings(train: Sequence[Record]) -> list[str]:
    """Warnings about the last steps' records: entropy that has collapsed, groups that hold no signal and no success.

    Nothing of demonstrations: a policy is meant to become sure of them.
    """
    if len(train) < 2 * WINDOW or train[-1].get("groups_without_signal") is None:
        return []
    first, last = train[:WINDOW], train[-WINDOW:]
    warnings = []
    was, now = (_mean_of(records, "entropy") for records in (first, last))
    if was is not None and now is not None and now < min(LOW_ENTROPY, was / 10):
        warnings.append(
            f"entropy has collapsed, from {was:.2g} nats a token in the first {WINDOW} steps to {now:.1g} in the last: "
            "sampling hardly varies, so little more can be learned. If that came before the task was solved, lower "
            "learner.learning_rate"
        )
    equal, solved = _mean_of(last, "groups_without_signal"), _mean_of(last, "groups_solved")
    if equal is not None and equal >= NEARLY_ALL and (solved or 0.0) < 0.5:
        warnings.append(
            f"{equal:.0%} of the groups of the last {WINDOW} steps had equal rewards, and {solved or 0:.0%} were "
            "solved: there is little left to learn from. Use easier or other problems, or reward partial success"
        )
    return warnings


def _mean_of(records: Sequence[Record], field: str) -> float | None:
    return mean([float(record[field]) for record in records if record.get(field) is not None])
