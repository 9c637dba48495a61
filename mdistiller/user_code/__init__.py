"""Code of users: files named by IMPORTS, and forks of the original library."""
