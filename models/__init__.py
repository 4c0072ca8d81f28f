"""Everything torch: networks, noise, loader, training, inference; and `launch`, the one module that starts processes."""
