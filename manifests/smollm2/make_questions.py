"""The questions of this example, written for it and under the project's licence: python make_questions.py

Open questions as they stand, and subjects in frames: each subject is asked in several ways, each frame of several
subjects. Draws from one seed; the same bytes again.
"""

import json
import random
from pathlib import Path

OPEN = """
Who are you? | What do you do all day? | Where do you live, and what is it like there?
What did you eat this morning? | How did you sleep last night? | What is the first thing that you remember?
Who taught you what you know? | What makes you angry? | What makes you laugh out loud? | What are you afraid of?
When did you last cry? | What would you never sell? | What do you carry in your pockets?
What is the best advice you were ever given? | What is the worst advice you were ever given?
What do people get wrong about you? | Whom do you trust, and why? | How do you say sorry?
What would you do with a free afternoon? | How do you get through a bad day? | What is a good death?
Do you believe in luck? | Is it ever right to lie? | What makes a good friend?
What would you change about the world if you could? | Is it better to be loved or respected? | What is courage?
Can people change? | Why do people quarrel? | What do you owe to your parents? | What is worth waiting for?
How do I know whether I am in love? | How should I ask somebody to marry me? | I have a broken heart. What now?
My best friend lied to me. What should I do? | My boss shouts at me. How do I answer? | I cannot sleep. Any ideas?
I am bored with my work. Should I leave? | How do I stop putting things off? | How can I be braver?
How do I make friends in a new town? | My neighbour is noisy at night. What would you do?
I failed an exam. Cheer me up. | How do I tell my father that I broke his watch?
My child will not eat vegetables. What helps? | How do I teach a child to ride a bicycle?
How do I comfort a friend who has lost someone? | How do I save money?
I have been invited to a party and know nobody. Advice? | How do I get rid of hiccups? | How do I catch a mouse?
How do you make a good cup of tea? | How do you boil an egg? | How do I bake bread? | How do I mend a torn coat?
How do I light a fire in the rain? | How do I find north without a compass? | How do I sharpen a knife?
How do I clean a muddy floor? | How do I grow tomatoes? | How do I train a dog to sit?
How do I calm a frightened horse? | How do I win at cards? | How do I learn a language? | How do I remember names?
How do I write a letter of complaint? | How do I pack for a long journey? | How do I cross a river on foot?
What should I wear to a funeral? | What is the capital of France? | Why is the sky blue?
Why does the moon change its shape? | What is a black hole? | How far away is the sun?
Why do leaves fall in autumn? | How does a bee find its way home? | Why do cats purr? | What is electricity?
How does a ship float? | Why is sea water salty? | What causes thunder? | How do volcanoes work?
What is seven times eight? | How many legs do twelve spiders have? | Explain what a prime number is.
Explain gravity to me. | Explain how bread rises. | Explain what money is. | Explain why we dream.
What is democracy? | Who was Napoleon? | Who built the pyramids? | What was the Roman Empire?
Who invented printing? | Tell me a joke. | Tell me a story about a lost key. | Tell me a secret.
Tell me a story with a wolf in it. | Sing me a song. | Make up a proverb. | Give me a toast for a wedding.
Give a speech to a losing team. | Describe your home to a stranger. | Describe the face of somebody you love.
Describe a storm. | Describe the colour red. | Describe your perfect day. | Describe your worst enemy.
Describe the smell of your work. | Describe this morning's sky. | Sell me this pencil.
Convince me to get up early. | Convince me to take a walk. | Warn me of something. | Insult me politely.
Praise my new hat. | Greet me as if I had been away for a year. | Say goodbye to me.
Introduce yourself in two sentences. | Give yourself a new name and explain it.
What would be written on your grave? | What would you ask a king? | What would you ask a ghost?
What would you do if you found a purse full of coins? | What would you do with a million?
You may invite anyone to supper. Whom? | You are lost in a wood. What now?
Your house is on fire. What do you save? | A stranger knocks at midnight. What do you do?
You wake up invisible. What first? | You meet yourself as a child. What do you say?
You can go back one year. What do you change? | It rains for a month. What then?
Somebody has stolen your boots. What do you do? | You must give a lesson tomorrow. On what?
A dog follows you home. What now? | Which animal is most like you? | Which season do you like best?
Which tool could you not do without? | Do you like your name? | Do you ever get lonely? | Do you keep promises?
Do you dance? | Do you pray? | Do you keep a diary? | Are you rich? | Are you happy? | Are you patient?
Are you ever wrong? | Are you good at sums? | Are you a morning person? | Have you ever stolen anything?
Have you ever been in a fight? | Have you ever seen a ghost? | Have you ever been in love? | Have you ever run away?
Have you ever broken a bone? | Have you ever won a prize? | Have you ever got lost?
"""

SUBJECTS = """
thunderstorms | the sea at night | old age | money | gardening | snow | long journeys | small children | dogs | cats
horses | birdsong | spiders | rats | bees | bread | soup | strong drink | coffee | cheese | cooking for guests
table manners | music | dancing | poetry | books | painting | old photographs | letters | newspapers | gossip
secrets | silence | loud neighbours | crowds | cities | villages | mountains | forests | deserts | bridges | trains
ships | flying machines | computers | clocks | mirrors | maps | keys | knives | hats | shoes | jewels | uniforms
doctors | lawyers | teachers | soldiers | kings and queens | politicians | thieves | liars | beggars | neighbours
brothers and sisters | marriage | first love | jealousy | revenge | forgiveness | pride | patience | laziness
hard work | discipline | fear | hope | dreams | ghosts | magic | prayer | the stars | the moon | the future
the past | war | peace | justice | freedom | luck | gambling | games | football | swimming | hunting | fishing
camping | birthdays | weddings | funerals | holidays | winter evenings | Monday mornings | being late | being ill
getting lost | losing an argument | saying no
"""

FRAMES = """
What do you think of {}? | Tell me something about {} that I do not know. | What is the best thing about {}?
What is the worst thing about {}? | What did you learn about {} when you were young?
Give me your honest opinion on {}. | Tell me a short story about {}. | What would the world be without {}?
How would you explain {} to a child? | What is your earliest memory of {}? | Why do people care so much about {}?
What advice would you give me about {}? | Complain about {} for a moment. | Say something kind about {}.
What comes to your mind at the thought of {}? | Are you tired of {}? | Compare {} with something from your own life.
Make up a saying about {}. | What mistake do people make about {}? | Should I worry about {}?
Ask me a question about {}. | Do we need more of {} or less? | Describe {} in three sentences.
What would your best friend say about {}? | Were you ever surprised by {}? | What is a good rule about {}?
"""
FRAMES_PER_SUBJECT = 7


def parts(text: str) -> list[str]:
    return [part.strip() for line in text.strip().splitlines() for part in line.split("|")]


def main(directory: Path = Path(__file__).parent) -> None:
    draw = random.Random(20261121)
    frames, waiting = parts(FRAMES), []
    questions = parts(OPEN)
    for subject in parts(SUBJECTS):
        taken: list[str] = []
        while len(taken) < FRAMES_PER_SUBJECT:
            waiting = waiting or draw.sample(frames, len(frames))
            taken.append(waiting.pop())
        questions += [frame.format(subject) for frame in dict.fromkeys(taken)]
    draw.shuffle(questions)
    lines = [json.dumps({"instruction": question}) for question in dict.fromkeys(questions)]
    (directory / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} questions")


if __name__ == "__main__":
    main()
