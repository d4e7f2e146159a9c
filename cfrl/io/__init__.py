"""Files in and out: structure files, datasets and rollouts in HDF5, tables, downloads."""
