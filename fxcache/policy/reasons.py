"""Why an evaluation was computed, as reports say it."""

from enum import Enum


class Reason(str, Enum):
    """The reason of a miss. A policy of your own may give any other text."""

    NOTHING_CACHED = "nothing cached"
    WARM_UP = "warm-up"
    FINAL_STEP = "final step"
    OUTSIDE_WINDOW = "outside start..end"
    NO_RATE = "no rate yet"
    NO_ERROR = "no error yet"
    SAME_STEP = "its step was computed"
    MAX_CONSECUTIVE_HITS = "max_consecutive_hits"
    SCHEDULED = "scheduled"
    BEYOND_MASK = "beyond the mask"
    BEYOND_TABLE = "beyond the table"
    ABOVE_THRESHOLD = "above threshold"
    ABOVE_TOLERANCE = "above tolerance"
    MAX_ACCUMULATED = "max_accumulated"
    NOT_FINITE = "not finite"
    OTHER_RANK = "another rank computes"
    FIRST_COMPUTED = "the first branch computed"
    CONTROL_CHANGED = "control changed"
    WEIGHTS_CHANGED = "weights changed"
    NUMBER_CHANGED = "a number of the model changed"
    UNCACHED = "after an uncached evaluation"
    UNKNOWN_BRANCH = "which branch it is cannot be told"
    POLICY_CHANGED = "another policy"
    AUDIT = "audit"

    def __repr__(self) -> str:
        return repr(self.value)

    def __str__(self) -> str:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)
