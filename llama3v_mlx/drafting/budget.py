"""Budget of a drafter: how many tokens it may draft, so that drafting in vain costs at most 2 % of a long answer."""

SHARE = 0.02  # passes that may be lost per token of the answer
GRANT = 1.0  # passes that may be lost at once, also the most that is saved up from SHARE
CAP = 4.0  # passes that may be lost after drafts that paid off
WAIT = 0.1  # passes lost by waiting for a token, so that the GPU idles meanwhile, and then drafting nothing
START, MOST = 2, 7  # drafted tokens; MLX's attention kernel for few queries takes up to 8


class Budget:
    """Account of one drafter in one answer, in units of a single-token pass."""

    def __init__(self):
        self._balance, self._length = GRANT, START

    def room(self) -> int:
        """Number of tokens that may be drafted now; 0 while drafting does not pay."""
        return self._length if self._balance > 0 else 0

    def single(self) -> None:
        """Record a token of a single pass."""
        if self._balance < GRANT:
            self._balance += SHARE

    def waited(self) -> None:
        """Record a wait for a token after which nothing was drafted."""
        self._balance -= WAIT

    def verified(self, drafted: int, written: int, cost: float) -> None:
        """Record a block: drafted tokens, tokens it added to the answer, and its time in single passes."""
        self._balance = min(self._balance + written - cost, CAP)
        accepted = min(drafted, written - 1)
        self._length = min(2 * self._length, MOST) if accepted == drafted else max(1, accepted)
