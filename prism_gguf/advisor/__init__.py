"""From a diagnosis to a better file: what each tensor costs in each type, and the best use of a budget."""
