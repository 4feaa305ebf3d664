"""Real images for the quickstart: emoji drawn by seven studios, in MMEB's and MMVP-VLM's layouts."""
