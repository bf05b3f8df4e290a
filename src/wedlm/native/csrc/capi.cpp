// SPDX-License-Identifier: Apache-2.0
#include "capi.h"

#include <cstring>
#include <exception>

#include "dispatch.h"
#include "model.h"

struct WedlmModel {
  wedlm::Model model;
};

namespace {

constexpr int32_t kMaxThreads = 1024;

// Runs `body`; -1 and its sentence if it threw.
template <class Body>
int32_t guarded(char* error, int64_t size, const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    std::strncpy(error, "there is not enough memory", static_cast<size_t>(size));
  } catch (const std::exception& problem) {
    std::strncpy(error, problem.what(), static_cast<size_t>(size));
  }
  error[size - 1] = 0;
  return -1;
}

}  // namespace

int32_t wedlm_abi_version(void) { return 6; }

int32_t wedlm_physical_cores(void) { return wedlm::physical_cores(); }

int32_t wedlm_path(int32_t i, const char** name, int32_t* runs, const char** needs) {
  const wedlm::Path* list;
  if (i < 0 || i >= wedlm::paths(&list)) return -1;
  *name = list[i].kernels->name;
  *runs = list[i].runs;
  *needs = list[i].needs;
  return 0;
}

WedlmModel* wedlm_model_new(const WedlmShape* shape, const char* path, int32_t threads, char* error, int64_t error_size) {
  WedlmModel* model = nullptr;
  guarded(error, error_size, [&] {
    const wedlm::Kernels* kernels = wedlm::choose_kernels(path);
    if (!kernels) throw wedlm::Error("the instruction set " + std::string(path) + " does not run on this processor");
    if (threads < 1 || threads > kMaxThreads) throw wedlm::Error("threads is " + std::to_string(threads) + "; expected 1 to " + std::to_string(kMaxThreads));
    model = new WedlmModel{{*shape, *kernels, threads}};
  });
  return model;
}

void wedlm_model_free(WedlmModel* model) { delete model; }

const char* wedlm_model_path(const WedlmModel* model) { return model->model.kernels().name; }

int32_t wedlm_model_set_matrix(WedlmModel* model, int32_t layer, int32_t which, int32_t format, int32_t rows, int32_t cols,
                               const void* data, const float* scale, char* error, int64_t error_size) {
  return guarded(error, error_size, [&] { model->model.set_matrix(layer, which, format, rows, cols, data, scale); });
}

int32_t wedlm_model_set_vector(WedlmModel* model, int32_t layer, int32_t which, int64_t size, const float* data, char* error,
                               int64_t error_size) {
  return guarded(error, error_size, [&] { model->model.set_vector(layer, which, size, data); });
}

int32_t wedlm_model_set_factors(WedlmModel* model, int32_t factors, int32_t layer, int32_t which, int32_t format, int32_t rank,
                                const void* a, const float* a_scale, const void* b, const float* b_scale, char* error,
                                int64_t error_size) {
  return guarded(error, error_size, [&] { model->model.set_factors(factors, layer, which, format, rank, a, a_scale, b, b_scale); });
}

int32_t wedlm_model_set_start(WedlmModel* model, int32_t factors, int64_t size, const float* data, char* error, int64_t error_size) {
  return guarded(error, error_size, [&] { model->model.set_start(factors, size, data); });
}

void wedlm_model_drop_factors(WedlmModel* model, int32_t factors) { model->model.drop_factors(factors); }

void wedlm_model_tie(WedlmModel* model) { model->model.tie(); }

int64_t wedlm_model_bytes(const WedlmModel* model) { return model->model.bytes(); }

int32_t wedlm_model_forward(WedlmModel* model, const WedlmStep* step, char* error, int64_t error_size) {
  return guarded(error, error_size, [&] { model->model.forward(*step); });
}

namespace {

// A packed copy for the tests of parts.
struct Packed {
  wedlm::Matrix matrix;
  wedlm::Buffer<uint8_t> data;
  wedlm::Buffer<float> scale;
};

Packed packed(int32_t format, int32_t rows, int32_t cols, const void* data, const float* scale) {
  Packed weights;
  wedlm::Matrix& matrix = weights.matrix;
  matrix.format = static_cast<wedlm::Format>(format);
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.panel_bytes = wedlm::source_bytes(format, wedlm::kPanel, format == wedlm::INT8 ? wedlm::round_up(cols, 32) : cols);
  weights.data.reserve(matrix.bytes());
  matrix.data = weights.data.data();
  weights.scale.reserve(int64_t{matrix.panels()} * wedlm::kPanel);
  matrix.scale = weights.scale.data();
  if (scale) std::memcpy(matrix.scale, scale, static_cast<size_t>(rows) * 4);
  wedlm::pack(matrix, static_cast<const uint8_t*>(data), 0, matrix.panels());
  return weights;
}

}  // namespace

int32_t wedlm_test_product(const char* path, int32_t format, int32_t rows, int32_t cols, const void* data, const float* scale,
                           int32_t num_inputs, const float* inputs, float* outputs) {
  const wedlm::Kernels* kernels = wedlm::choose_kernels(path);
  if (!kernels) return -1;
  Packed weights = packed(format, rows, cols, data, scale);
  wedlm::InputKind kind = wedlm::format_info(format)->input;
  wedlm::Inputs x;
  x.reserve(num_inputs, cols, kind == wedlm::InputKind::kFloat, kind == wedlm::InputKind::kInt8Blocks);
  for (int64_t i = 0; i < num_inputs; i++) x.put(*kernels, i, inputs + i * cols);
  int64_t stride = int64_t{weights.matrix.panels()} * wedlm::kPanel;
  wedlm::Buffer<float> y;
  y.reserve(num_inputs * stride);
  kernels->product(weights.matrix, x.view(), num_inputs, 0, weights.matrix.panels(), y.data(), stride, false);
  for (int64_t i = 0; i < num_inputs; i++) std::memcpy(outputs + i * rows, y.data() + i * stride, static_cast<size_t>(rows) * 4);
  return 0;
}

int32_t wedlm_test_unpack(int32_t format, int32_t rows, int32_t cols, const void* data, const float* scale, float* out) {
  Packed weights = packed(format, rows, cols, data, scale);
  for (int32_t row = 0; row < rows; row++) wedlm::unpack_row(weights.matrix, row, out + int64_t{row} * cols);
  return 0;
}

int32_t wedlm_test_norm(const char* path, const float* x, const float* weight, float eps, int64_t n, float* y) {
  const wedlm::Kernels* kernels = wedlm::choose_kernels(path);
  if (!kernels) return -1;
  kernels->rms_norm(x, weight, eps, n, y);
  return 0;
}

int32_t wedlm_test_rotate(const char* path, float* head, const float* cos, const float* sin, int64_t dim) {
  const wedlm::Kernels* kernels = wedlm::choose_kernels(path);
  if (!kernels) return -1;
  kernels->rotate(head, cos, sin, dim);
  return 0;
}

int32_t wedlm_test_silu_mul(const char* path, float* gate, const float* up, int64_t n) {
  const wedlm::Kernels* kernels = wedlm::choose_kernels(path);
  if (!kernels) return -1;
  kernels->silu_mul(gate, up, n);
  return 0;
}

int32_t wedlm_test_exp(const char* path, const float* x, int64_t n, float* y) {
  const wedlm::Kernels* kernels = wedlm::choose_kernels(path);
  if (!kernels) return -1;
  for (int64_t i = 0; i < n; i++) y[i] = kernels->exp(x[i]);
  return 0;
}
