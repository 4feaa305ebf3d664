"""Real images for the quickstart: emoji drawn by eight studios, in MMEB's and MMVP-VLM's layouts."""
