// The kernels against plain loops, as a program of its own: for CPUs that are only emulated here (test_kernels_arm.py).
#include <cstdio>
#include <initializer_list>
#include "library.cpp"

static unsigned seed = 1;
static float next() {  // from -1 to 1
  seed = seed * 1664525u + 1013904223u;
  return float(int(seed >> 8) - (1 << 23)) / float(1 << 23);
}

static double error_of(int32_t type, long in, long out, long rows) {
  const long groups = (in + 31) / 32, blocks = (out + 15) / 16, num_scales = out + blocks * groups * 32;
  float *w = new float[out * in], *x = new float[rows * in], *y = new float[rows * out], *scales = new float[num_scales];
  uint8_t* bytes = new uint8_t[out * in * 4 + blocks * groups * 256];
  for (long i = 0; i < rows * in; ++i) x[i] = next();
  for (long i = 0; i < num_scales; ++i) scales[i] = next();
  for (long i = 0; i < out * in + blocks * groups * 256; ++i) next(), bytes[i] = uint8_t(seed >> 11);
  for (long i = 0; i < out * in; ++i) {
    if (type == FLOAT32) ((float*)bytes)[i] = next();
    else if (type == BFLOAT16) narrow(next(), (bf16*)bytes + i);
    else if (type == FLOAT16) narrow(next(), (half*)bytes + i);
    else if (type == INT8 && bytes[i] == 128) bytes[i] = 0;
  }
  const Matrix m{type, FLOAT32, out, in, bytes, scales, 1};
  litgpt_widen(&m, w, FLOAT32, 0, out, 2);
  litgpt_linear(&m, x, FLOAT32, y, FLOAT32, rows, 2);
  double error = 0, size = 0;
  for (long b = 0; b < rows; ++b)
    for (long r = 0; r < out; ++r) {
      double expected = 0;
      for (long k = 0; k < in; ++k) expected += double(x[b * in + k]) * w[r * in + k];
      error += (expected - y[b * out + r]) * (expected - y[b * out + r]), size += expected * expected;
    }
  delete[] w, delete[] x, delete[] y, delete[] scales, delete[] bytes;
  return std::sqrt(error / size);
}

int main() {
  int failures = 0;
  for (int32_t type : {FLOAT32, BFLOAT16, FLOAT16, INT8, INT4})
    for (long in : {33L, 64L, 70L})
      for (long out : {17L, 64L})
        for (long rows : {1L, 2L, 5L, 9L}) {
          const double error = error_of(type, in, out, rows);
          if (!(error < 5e-5)) ++failures, printf("type %d, (%ld, %ld), %ld rows: %g\n", type, out, in, rows, error);
        }
  for (float v : {-9.f, -1.f, -0.01f, 0.f, 0.05f, 0.3f, 2.f, 20.f}) {
    const double error = std::fabs(litgpt::exp(all(v))[1] / std::exp(double(v)) - 1) +
                         std::fabs(litgpt::tanh(all(v))[0] - std::tanh(double(v))) +
                         std::fabs(litgpt::erf(all(v))[0] - std::erf(double(v)));
    if (!(error < 2e-6)) ++failures, printf("functions of %g: %g\n", v, error);
  }
  printf("%d failures\n", failures);
  return failures != 0;
}
