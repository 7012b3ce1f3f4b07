"""How things are drawn: heatmaps, curves, circuits, grids, tables; from tables alone."""
