"""What the focal-loss paper (Lin et al. 2017) claims, to be looked at; `tools/focal_lab.py` runs it.

`curves`: figure 1. `distribution` and `anchors`: figure 4, on a trained detector. `ablation` and `standings`: table 1 in small.
"""
