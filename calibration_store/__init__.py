"""The only place that knows folders, file names, formats and keys; NumPy, no MLX, no command line.

A module a format, which it declares, checks, reads and writes: manifest, samples, pictures (1), block_cache (2W),
partials, statistics (2A), weights, checkpoint (3W), configs (3A, 3A'), evaluation (4), model_folder. Below them: layout (where
files are), names (layers and keys), stage_folder (the life of a stage), schema, npz, files, errors. FORMAT strings
and keys are a contract (calibration_data/README.md): extra keys may be added, existing ones keep their meaning.
"""
