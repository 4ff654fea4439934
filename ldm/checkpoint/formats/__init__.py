"""Safe readers of checkpoint files: containers, pickles and storages. Nothing here imports other parts of `ldm`."""
