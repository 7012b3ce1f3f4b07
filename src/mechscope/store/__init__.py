"""Run folders: what a study leaves on disk, written so that a crash cannot hurt it and a reader can check it (idea 10 of the design)."""
