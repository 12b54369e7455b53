"""The packages whose names others use too (conf, data, engine, evaluation), under one name of their own.

In the repository they are symbolic links to the folders beside this one. vqgan and prior keep their names.
"""
