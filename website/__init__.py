"""How the documentation site is made: `make docs`. Not part of the package."""
