"""Checks of a machine or an allocation before a long job: see launcher/doctor.py."""
