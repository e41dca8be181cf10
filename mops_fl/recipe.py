"""How the backbone is pruned, as one word of the run-config: `sparsegpt:75%`, `sparsegpt:2:4`, `wanda:7:8`."""

import re
from dataclasses import dataclass

from mops_fl.errors import InputError

ALGORITHMS = ("sparsegpt", "wanda")
BLOCK_SIZE = 128  # columns that SparseGPT prunes in one pass; its groups of N:M start anew in each

_FORM = re.compile(
    r"(?P<algorithm>[a-z]+):((?P<percent>\d+(\.\d+)?)%|(?P<zeros>\d+):(?P<of>\d+))(@(?P<key>[0-9a-f]+))?"
)


@dataclass(frozen=True)
class PruningRecipe:
    """One way to prune.

    Attributes:
        algorithm: `sparsegpt` (Frantar and Alistarh, arXiv 2301.00774) or `wanda` (Sun et al., arXiv 2306.11695).
        sparsity: share of each matrix's weights that become zero.
        group: `(N, M)`: in each row, of each `M` weights that follow one another, `N` become zero; None: anywhere.
        key: first characters of the key of one compressed model, where the recipe made several; empty: any.
    """

    algorithm: str
    sparsity: float
    group: tuple[int, int] | None
    key: str

    @classmethod
    def parse(cls, text: str) -> "PruningRecipe":
        """Read `<algorithm>:<percent>%` or `<algorithm>:N:M`, with `@<key>` behind it or not.

        Raises:
            InputError: it has another form, or prunes nothing or everything.
        """
        match = _FORM.fullmatch(text)
        if match is None or match["algorithm"] not in ALGORITHMS:
            raise InputError(
                f"`compression` is {text!r}; choose none, or an algorithm ({', '.join(ALGORITHMS)}) with a share or "
                "N zeros of every M weights, for instance sparsegpt:75% or sparsegpt:2:4."
            )
        key = match["key"] or ""
        if match["percent"]:
            sparsity, group = float(match["percent"]) / 100, None
        else:
            zeros, of = int(match["zeros"]), int(match["of"])
            if of == 0 or BLOCK_SIZE % of:
                raise InputError(f"`compression` is {text!r}; groups must be of 2, 4, 8, 16, 32, 64 or 128 weights.")
            sparsity, group = zeros / of, (zeros, of)
        if not 0 < sparsity < 1:
            raise InputError(f"`compression` is {text!r}; prune more than none and less than all of the weights.")
        return cls(match["algorithm"], sparsity, group, key)

    def __str__(self) -> str:
        """The recipe in its one normal form, without the key."""
        amount = f"{self.group[0]}:{self.group[1]}" if self.group else f"{100 * self.sparsity:.10g}%"
        return f"{self.algorithm}:{amount}"
