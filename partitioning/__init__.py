"""Who owns which row: task labels in, lists of row indices out."""

OWN_ROWS = "own-rows"  # the partitioner of a federation where nothing is dealt: each client has rows of its own
