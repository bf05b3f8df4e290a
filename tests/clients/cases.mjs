// SPDX-License-Identifier: Apache-2.0
// The npm clients' cases, as cases.py has those of Python: node cases.mjs CLIENT URL MODEL TOKENIZER.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const [client, url, model] = process.argv.slice(2);
const question = "What is the capital of France?";
const messages = [{ role: "user", content: question }];
const schema = {
  type: "object",
  properties: { digit: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["digit"],
  additionalProperties: false,
};

function done(name, shown = "") {
  const text = typeof shown === "string" ? shown : JSON.stringify(shown);
  console.log(`{"case": ${JSON.stringify(name)}, "shown": ${JSON.stringify(text)}}`);
}

function checkDigit(value) {
  assert(Number.isInteger(value.digit) && value.digit >= 0 && value.digit <= 9, JSON.stringify(value));
  return value;
}

async function refused(name, call, status) {
  let error;
  await assert.rejects(call, (caught) => ((error = caught), true));
  assert.equal(error.status ?? error.statusCode, status, String(error));
  done(`refused: ${name}`, error.message);
}

async function aiSdk() {
  const { embed, generateText, jsonSchema, Output, stepCountIs, streamText, tool } = await import("ai");
  const { createOpenAI } = await import("@ai-sdk/openai");
  const { createAnthropic } = await import("@ai-sdk/anthropic");
  const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
  const options = { baseURL: `${url}/v1`, apiKey: "none" };
  const compatible = createOpenAICompatible({ name: "wedlm", supportsStructuredOutputs: true, includeUsage: true, ...options });
  const add = tool({ description: "Adds one", inputSchema: jsonSchema(schema), execute: async ({ digit }) => digit + 1 });
  const common = { maxRetries: 0, prompt: question, maxOutputTokens: 12 };
  const form = Output.object({ schema: jsonSchema(schema) });
  for (const [name, one] of [
    ["openai-compatible", compatible(model)],
    ["openai, by default (Responses)", createOpenAI(options)(model)],
    ["openai.chat", createOpenAI(options).chat(model)],
    ["anthropic", createAnthropic(options)(model)],
  ]) {
    done(`${name}: generateText`, (await generateText({ ...common, model: one })).text);
    const stream = streamText({ ...common, model: one, onError: ({ error }) => { throw error; } });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    assert.equal(text, await stream.text);
    assert.ok((await stream.usage).outputTokens > 0);
    done(`${name}: streamText`, text);
    const forced = { tools: { add }, toolChoice: "required", maxOutputTokens: 60 };
    const called = await generateText({ ...common, ...forced, model: one });
    assert.equal(called.toolResults[0].output, checkDigit(called.toolCalls[0].input).digit + 1);
    done(`${name}: a required tool`, called.toolCalls[0].input);
    const formed = await generateText({ ...common, model: one, maxOutputTokens: 60, output: form });
    done(`${name}: Output.object`, checkDigit(formed.output));
  }
  const both = { ...common, model: compatible(model), maxOutputTokens: 60, stopWhen: stepCountIs(3) };
  const answer = await generateText({ ...both, tools: { add }, output: form });
  if (answer.finishReason !== "tool-calls") checkDigit(answer.output); // a model without sense may call for ever
  done("openai-compatible: tools beside Output.object", answer.finishReason);
  const effort = { providerOptions: { wedlm: { reasoningEffort: "low" } } };
  done("openai-compatible: reasoningEffort", (await generateText({ ...common, ...effort, model: compatible(model) })).text);
  await refused("embed", () => embed({ maxRetries: 0, model: compatible.embeddingModel(model), value: "x" }), 404);
}

async function langchain() {
  const { ChatOpenAI } = await import("@langchain/openai");
  const { tool } = await import("@langchain/core/tools");
  const options = { model, apiKey: "none", configuration: { baseURL: `${url}/v1` }, temperature: 0, maxRetries: 0 };
  const chat = new ChatOpenAI({ ...options, maxTokens: 12 });
  const text = (await chat.invoke(question)).text;
  done("invoke", text);
  let streamed = "";
  for await (const chunk of await chat.stream(question)) streamed += chunk.text;
  assert.equal(streamed, text);
  done("stream");
  assert.equal((await new ChatOpenAI({ ...options, maxTokens: 12, useResponsesApi: true }).invoke(question)).text, text);
  done("useResponsesApi");
  const add = tool(({ digit }) => digit + 1, { name: "add", description: "Adds one", schema });
  const longer = new ChatOpenAI({ ...options, maxTokens: 60 });
  const called = await longer.bindTools([add], { tool_choice: "any" }).invoke(question);
  done("a forced tool", checkDigit(called.tool_calls[0].args));
  const formed = longer.withStructuredOutput({ title: "Answer", ...schema }, { method: "jsonSchema" });
  done("withStructuredOutput", checkDigit(await formed.invoke(question)));
}

async function openai() {
  const { OpenAI } = await import("openai");
  const api = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const asked = { model, messages, max_tokens: 12, temperature: 0 };
  const text = (await api.chat.completions.create(asked)).choices[0].message.content;
  done("chat", text);
  const stream = api.chat.completions.stream(asked);
  assert.equal(await stream.finalContent(), text);
  done("chat, the stream helper");
  const format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
  const parsed = await api.chat.completions.parse({ ...asked, max_tokens: 60, response_format: format });
  done("chat, parsed", checkDigit(JSON.parse(parsed.choices[0].message.content)));
  const functions = [{ type: "function", function: { name: "add", description: "Adds one", parameters: schema } }];
  const forced = { ...asked, max_tokens: 60, tools: functions, tool_choice: "required" };
  const call = (await api.chat.completions.stream(forced).finalMessage()).tool_calls[0];
  done("a required tool, streamed", checkDigit(JSON.parse(call.function.arguments)));
  const first = await api.responses.create({ model, input: question, max_output_tokens: 12 });
  const responses = api.responses.stream({ model, input: "More", previous_response_id: first.id, max_output_tokens: 12 });
  const names = new Set();
  for await (const event of responses) names.add(event.type);
  assert.ok((await responses.finalResponse()).output.length);
  done("responses, then their stream helper", [...names]);
  await refused("unknown model", () => api.chat.completions.create({ ...asked, model: "x" }), 404);
}

async function anthropic() {
  const { Anthropic } = await import("@anthropic-ai/sdk");
  const api = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
  const asked = { model, messages, max_tokens: 12 };
  done("messages", (await api.messages.create(asked)).content[0].text);
  const stream = api.messages.stream(asked);
  const names = new Set();
  for await (const event of stream) names.add(event.type);
  done("the stream helper", await stream.finalText());
  done("its events", [...names]);
  done("countTokens", String((await api.messages.countTokens({ model, messages })).input_tokens));
  const tools = [{ name: "add", description: "Adds one", input_schema: schema }];
  const forced = await api.messages.stream({ ...asked, max_tokens: 60, tools, tool_choice: { type: "any" } }).finalMessage();
  done("a forced tool, streamed", checkDigit(forced.content[0].input));
  await refused("unknown model", () => api.messages.create({ ...asked, model: "x" }), 404);
}

/** Its command, over two tests of each kind of provider that speaks to a server; what they assert is for any model. */
async function promptfoo() {
  const packages = new URL("node_modules/promptfoo/", import.meta.url);
  const { bin } = JSON.parse(readFileSync(new URL("package.json", packages)));
  const command = fileURLToPath(new URL(bin.promptfoo, packages));
  const config = { apiBaseUrl: `${url}/v1`, apiKey: "none" };
  const response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
  const functions = [{ type: "function", function: { name: "add", description: "Adds one", parameters: schema } }];
  const said = { type: "javascript", value: "typeof output === 'string'" };
  for (const [name, provider, asserted] of [
    ["openai:chat", { id: `openai:chat:${model}`, config }, said],
    ["openai:chat, response_format", { id: `openai:chat:${model}`, config: { ...config, response_format } }, { type: "is-json", value: schema }],
    ["openai:chat, a required tool", { id: `openai:chat:${model}`, config: { ...config, tools: functions, tool_choice: "required" } }, { type: "is-valid-openai-tools-call" }],
    ["openai:completion", { id: `openai:completion:${model}`, config: { ...config, max_tokens: 24 } }, said],
    ["openai:responses", { id: `openai:responses:${model}`, config }, said],
    ["anthropic:messages", { id: `anthropic:messages:${model}`, config: { apiBaseUrl: url, apiKey: "none" } }, said],
    ["ollama:chat", { id: `ollama:chat:${model}` }, said],
  ]) {
    const tests = ["France", "Italy"].map((country) => ({ vars: { country }, assert: [asserted] }));
    const prompts = ["The capital of {{country}} is"];
    writeFileSync("promptfooconfig.json", JSON.stringify({ prompts, providers: [provider], tests }));
    const environment = { ...process.env, OLLAMA_BASE_URL: url, NO_COLOR: "1" };
    const words = [command, "eval", "--no-cache", "--no-table", "--output", "results.json"];
    const ran = spawnSync(process.execPath, words, { env: environment, encoding: "utf8" });
    assert.equal(ran.status, 0, ran.stdout + ran.stderr);
    const { stats, results } = JSON.parse(readFileSync("results.json", "utf8")).results;
    assert.deepEqual([stats.successes, stats.failures, stats.errors], [2, 0, 0], ran.stdout);
    done(`promptfoo eval, ${name}`, results.map((one) => one.response.output));
  }
}

const clients = { ai: aiSdk, "@langchain/openai": langchain, openai, "@anthropic-ai/sdk": anthropic, promptfoo };
await clients[client]();
