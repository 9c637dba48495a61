"""What commands share: arguments, errors, tables, networks to look at."""
