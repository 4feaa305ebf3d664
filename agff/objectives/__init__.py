"""One file per training objective of the family."""
