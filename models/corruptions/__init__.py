"""The fifteen corruptions of ImageNet-C and CIFAR-10-C, made on the fly: kind and severity in, pixels out. Without torch.

    corrupt(pixels, "fog", 3, noise_of(seed, "fog", 3, key), "imagenet")

Written anew from the benchmark's published parameters (Hendrycks and Dietterich 2019 and their released code, whose numbers
are in levels.py) with numpy, scipy and Pillow: the packages that offer it draw from numpy's global generator, so threads
would mix images up, and bring OpenCV, scikit-image and numba along. Randomness comes from the generator that is passed in.

Deviations: frost is drawn, where the benchmark crops six photographs (fields.py); impulse noise, motion blur, zoom and elastic warps
do the same arithmetic in another order, and agree to rounding.
"""
