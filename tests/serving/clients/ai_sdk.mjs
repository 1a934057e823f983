// The Vercel AI SDK, by both of its providers: a chat of three turns, a stream, a structured answer, an error.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import { z } from "zod";

const [baseURL] = process.argv.slice(2);
const compatible = createOpenAICompatible({ name: "ours", baseURL, supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL, apiKey: "none" });
const schema = z.object({ mood: z.enum(["calm", "wild"]), ok: z.boolean() });
const found = {};
for (const [name, model] of Object.entries({ compatible: compatible("tiny"), responses: openai("tiny"), chat: openai.chat("tiny") })) {
  const messages = [];
  const common = { model, maxOutputTokens: 20, maxRetries: 0 };
  for (let turn = 0; turn < 3; turn++) {
    messages.push({ role: "user", content: `Turn ${turn}` });
    const answer = await generateText({ ...common, messages });
    messages.push(...answer.response.messages);
  }
  let streamed = "";
  for await (const part of streamText({ ...common, prompt: "Hello" }).textStream) streamed += part;
  const { object } = await generateObject({ ...common, maxOutputTokens: 99, schema, prompt: "Who?" });
  let error = null;
  try {
    await generateText({ ...common, maxOutputTokens: 10 ** 9, prompt: "Hello" });
  } catch (refused) {
    error = refused.statusCode;
  }
  found[name] = { turns: messages.length, streamed, object, error };
}
console.log(JSON.stringify(found));
