"""masksparsity"""
