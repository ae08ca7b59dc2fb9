"""Builds the pure package."""

from setuptools import setup

setup()
