"""Convert detection weights of other libraries to files of this one."""
