"""The techniques under contract, one file for each package; every file has a dictionary `TECHNIQUES`."""
