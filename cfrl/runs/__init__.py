"""Work that takes long: run folders, engines and devices, progress, interruption."""
