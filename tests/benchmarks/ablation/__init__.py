"""`make ablation`: the method under a microscope, on synthetic scenes, over several seeds."""
