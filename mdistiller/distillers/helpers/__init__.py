"""What methods share; a module here holds no method and is no entry of `distiller_dict`."""
