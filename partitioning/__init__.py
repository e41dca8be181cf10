"""Who owns which row: task labels in, lists of row indices out."""
